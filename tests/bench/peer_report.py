"""Tables of a comparison: measured rows in; what each server reached, the ratios, and which goals they meet, out."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tests.bench.closed_loop import Point
from tests.bench.figures import Goal, Measure, Ratio, goals_for, ratio
from tests.bench.workloads import WORKLOADS

OURS = "manta"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One workload on one server in one repeat."""

    side: str
    variant: str
    workload: str
    repeat: int
    start_s: float
    resident_bytes: int
    point: Point


def print_report(rows: Sequence[Row], console: Console) -> None:
    """Starts, figures, then ratios with goals."""
    console.print(start_table(rows))
    console.print(figures_table(rows))
    if any(row.side != OURS for row in rows) and any(row.side == OURS for row in rows):
        console.print(ratio_table(rows))


def start_table(rows: Sequence[Row]) -> Table:
    """How long every server took to start, and the memory of its processes after the last workload."""
    table = Table("server", "start s", "resident GiB", title="servers")
    for side, variant in dict.fromkeys((row.side, row.variant) for row in rows):
        group = [row for row in rows if (row.side, row.variant) == (side, variant)]
        starts = dict.fromkeys(f"{row.start_s:.0f}" for row in group)
        table.add_row(f"{side} {variant}", ", ".join(starts), f"{group[-1].resident_bytes / 2**30:.1f}")
    return table


def figures_table(rows: Sequence[Row]) -> Table:
    """One line per server and workload, the mean of the repeats."""
    table = Table(
        "workload", "streams x in/out", "server", "tok/s", "TTFT p50/p95", "ITL p50/p99", "tokens/event",
        "client CPU", "others' CPU", "errors", title="what each server reached (ms; CPU in cores)",
    )  # fmt: skip
    for workload in dict.fromkeys(row.workload for row in rows):
        for side, variant in dict.fromkeys((row.side, row.variant) for row in rows):
            group = [row for row in rows if (row.side, row.variant, row.workload) == (side, variant, workload)]
            if group:
                table.add_row(workload, WORKLOADS[workload].shape, f"{side} {variant}", *_cells(group))
        table.add_section()
    return table


def _cells(group: Sequence[Row]) -> list[str]:
    points = [row.point for row in group]
    rates = [point.figures.tokens_per_s for point in points]
    return [
        f"{statistics.fmean(rates):.1f} ({min(rates):.1f}..{max(rates):.1f})"
        if len(rates) > 1
        else f"{rates[0]:.1f}",
        _latencies(points, "first_token", ("p50_ms", "p95_ms")),
        _latencies(points, "gap", ("p50_ms", "p99_ms")),
        f"{statistics.fmean(point.figures.tokens_per_event for point in points):.2f}",
        f"{statistics.fmean(point.cpu.client_s / point.cpu.wall_s for point in points):.2f}",
        f"{max(point.cpu.others_cores for point in points):.2f}",
        str(sum(point.figures.num_errors for point in points)),
    ]


def _latencies(points: Sequence[Point], which: str, percentiles: tuple[str, str]) -> str:
    found = [value for point in points if (value := getattr(point.figures, which)) is not None]
    if not found:
        return "-"
    return " / ".join(f"{statistics.fmean(getattr(value, name) for value in found):.0f}" for name in percentiles)


MEASURES: dict[Measure, Callable[[Point], float]] = {
    "tok/s": lambda point: point.figures.tokens_per_s,
    "TTFT p50": lambda point: point.figures.first_token.p50_ms if point.figures.first_token else 0.0,
}


def ratio_table(rows: Sequence[Row]) -> Table:
    """One line per workload, peer and variant of Manta; a goal on TTFT has a line of its own."""
    table = Table("workload", "against", "manta", "measure", "ratio", "spread", "goal", "", title="ratios")
    peers = dict.fromkeys((row.side, row.variant) for row in rows if row.side != OURS)
    variants = dict.fromkeys(row.variant for row in rows if row.side == OURS)
    for workload in dict.fromkeys(row.workload for row in rows):
        for peer, peer_variant in peers:
            for variant in variants:
                ours = _of(rows, OURS, variant, workload)
                theirs = _of(rows, peer, peer_variant, workload)
                for measure, goal in _asked(workload, peer, variant):
                    found = compared(ours, theirs, measure)
                    table.add_row(workload, f"{peer} {peer_variant}", variant, measure, *_verdict(found, goal))
        table.add_section()
    return table


def _of(rows: Sequence[Row], side: str, variant: str, workload: str) -> list[Point]:
    return [row.point for row in rows if (row.side, row.variant, row.workload) == (side, variant, workload)]


def _asked(workload: str, peer: str, variant: str) -> list[tuple[Measure, Goal | None]]:
    goals = goals_for(workload, peer, variant)
    asked: list[tuple[Measure, Goal | None]] = [(goal.measure, goal) for goal in goals]
    if not any(goal.measure == "tok/s" for goal in goals):
        asked.insert(0, ("tok/s", None))
    return asked


def compared(ours: Sequence[Point], theirs: Sequence[Point], measure: Measure) -> Ratio | None:
    """The ratio over the repeats that both sides have; None where a side measured nothing."""
    pairs = list(zip(map(MEASURES[measure], ours), map(MEASURES[measure], theirs), strict=False))
    if not pairs or any(min(pair) <= 0 for pair in pairs):
        return None
    return ratio([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def _verdict(found: Ratio | None, goal: Goal | None) -> list[str]:
    if found is None:
        return ["-", "-", str(goal or ""), "not measured"]
    spread = f"{found.lowest:.2f}..{found.highest:.2f}"
    said = "" if goal is None else "[green]met[/]" if goal.met(found.value) else "[red]missed[/]"
    return [f"{found.value:.2f}x", spread, str(goal or ""), said]
