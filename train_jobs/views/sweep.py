"""A sweep for people: its trials in, a table of 80 columns out."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cluster.runs.sweep import Sweep, Trial, ranked
from train_jobs.job import TuneSpec
from train_jobs.views.tables import columns


def sweep_view(sweep: Sweep) -> RenderableType:
    """All trials, the best first; errors below, as they are long."""
    table = columns()
    table.add_column("trial", justify="right")
    for name in sweep.trials[0].values if sweep.trials else ():
        table.add_column(name, overflow="fold")
    for name in (sweep.metric, "step", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("outcome", no_wrap=True)
    for trial in ranked(sweep):
        best = trial.number == sweep.best
        table.add_row(*_row(trial, best=best), style="bold" if best else None)
    parts: list[RenderableType] = [Text.assemble((f"Sweep {sweep.job}", "bold"), f"  over {sweep.varied}"), table]
    parts += [Text(f"Trial {trial.number}: {trial.error}") for trial in sweep.trials if trial.error]
    return Group(*parts)


def points_view(spec: TuneSpec, points: Sequence[Mapping[str, Any]] | None) -> RenderableType:
    """The trials of a sweep that has not begun; None where each depends on those before."""
    heading = Text.assemble((f"Sweep {spec.name}", "bold"), f"  over {spec.job}, {spec.search}")
    if points is None:
        ranges = [f"{path}: {space.kind} {value_text(space.values)}" for path, space in spec.space.items()]
        return Group(heading, *(Text(line) for line in (f"{spec.trials} trials, chosen as they go, from", *ranges)))
    table = columns()
    table.add_column("trial", justify="right")
    for path in spec.space:
        table.add_column(path, overflow="fold")
    for number, point in enumerate(points, start=1):
        table.add_row(str(number), *(value_text(value) for value in point.values()))
    return Group(heading, table)


def _row(trial: Trial, *, best: bool) -> list[str]:
    score = "" if trial.score is None else f"{trial.score:.4f}"
    outcome = "best" if best else trial.status
    values = [value_text(value) for value in trial.values.values()]
    return [str(trial.number), *values, score, str(trial.step), f"{trial.seconds:.0f}", outcome]


def value_text(value: Any) -> str:
    """A setting's value on one line."""
    if isinstance(value, list):
        return ", ".join(map(value_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {value_text(inner)}" for name, inner in value.items())
    return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
