"""Results of a drill in, a table for people that fits 80 columns and JSON for programs out."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.control.drill.parts import DETECT
from cluster.control.drill.phase import Result, Scenario

_COLUMNS = ("scenario", "asked", "failed", "changed", "gap p50/max", "detect", "recover", "verdict")


def results_view(results: Sequence[Result], notes: Sequence[str]) -> RenderableType:
    """The table, then every broken promise in full, then what a person should know."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("scenario", "verdict") else "right")
    for result in results:
        table.add_row(*_row(result))
    broken = [Text(line, style="red") for result in results for line in _broken_lines(result)]
    told = [Text(f"  {result.scenario}: {note}") for result in results for note in _notes(result)]
    return Group(table, *broken, *told, *(Text(f"  {note}") for note in notes))


def scenarios_view(scenarios: Sequence[Scenario]) -> RenderableType:
    """Names and summaries."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("scenario", "what happens", "by default"):
        table.add_column(name)
    for scenario in scenarios:
        table.add_row(scenario.name, scenario.summary, "yes" if scenario.by_default else "no")
    return table


def _row(result: Result) -> tuple[str, ...]:
    if result.skipped is not None:
        return (result.scenario, *[""] * 6, "skipped")
    changed = "-" if result.num_changed is None else str(result.num_changed)
    counts = (str(result.num_requests), str(result.num_failed), changed)
    return (result.scenario, *counts, *_times(result), "kept" if result.kept else "BROKEN")


def _times(result: Result) -> tuple[str, str, str]:
    detect = f"{result.parts[DETECT].mean_s:.2f} s" if DETECT in result.parts else ""
    if result.pause is None:
        return "", detect, ""
    return f"{result.pause.p50_s:.1f}/{result.pause.max_s:.1f} s", detect, f"{result.pause.recover_s:.1f} s"


def _broken_lines(result: Result) -> list[str]:
    return [f"{result.scenario}: not kept: {each.text}: {each.detail}" for each in result.promises if not each.kept]


def _notes(result: Result) -> list[str]:
    skipped = [] if result.skipped is None else [f"skipped, {result.skipped}"]
    shown = [f"{each.text}: {each.detail}" for each in result.promises if each.kept and each.shown]
    return [*skipped, *shown, *result.notes]


def results_json(results: Sequence[Result], notes: Sequence[str], model: str) -> dict[str, Any]:
    """Everything that was found; times in seconds."""
    return {
        "model": model,
        "kept": all(result.kept for result in results),
        "notes": list(notes),
        "scenarios": [_result_json(result) for result in results],
    }


def _result_json(result: Result) -> dict[str, Any]:
    pause = result.pause
    return {
        "scenario": result.scenario,
        "verdict": "skipped" if result.skipped is not None else "kept" if result.kept else "broken",
        "skipped": result.skipped,
        "num_requests": result.num_requests,
        "num_failed": result.num_failed,
        "num_changed": result.num_changed,
        "gap_p50_s": None if pause is None else pause.p50_s,
        "gap_max_s": None if pause is None else pause.max_s,
        "parts_s": {name: part.mean_s for name, part in result.parts.items()},
        "recover_s": None if pause is None else pause.recover_s,
        "promises": [{"text": each.text, "kept": each.kept, "detail": each.detail} for each in result.promises],
        "notes": list(result.notes),
    }
