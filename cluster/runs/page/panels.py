"""Which charts a run has: its record in, charts over one common axis of steps out."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

from cluster.runs.log import StepReport
from cluster.runs.page.chart import Axis, Chart, Line, draw
from cluster.runs.page.curves import Point, duration, percent, short, smooth, thin
from cluster.runs.record import RunRecord

_SHARES = ("accuracy", "macro_f1", "token_accuracy")
_OTHERS = (
    ("bits_per_byte", "bits per byte"),
    ("perplexity", "perplexity"),
    ("calibration_error", "calibration error"),
    ("margin", "reward margin"),
)


def charts(record: RunRecord) -> list[Chart]:
    """Every chart that the run has numbers for; none before its first step."""
    if not record.steps:
        return []
    axis = _axis(record)
    return [
        _loss(record, axis),
        *_metrics(record, axis),
        _curve(record, axis, "learning rate", lambda line: line.learning_rate),
        _curve(record, axis, "gradient norm", lambda line: line.grad_norm, hint="before clipping"),
        _curve(record, axis, "tokens per second", lambda line: line.tokens_per_s, hint="real tokens, all workers"),
        _data_wait(record, axis),
        _stalls(record, axis),
        _memory(record, axis),
        *_staleness(record, axis),
    ]


def _axis(record: RunRecord) -> Axis:
    marks = [
        (attempt.resumed_from, f"attempt {number} continues after step {attempt.resumed_from}")
        for number, attempt in enumerate(record.state.attempts, start=1)
        if attempt.resumed_from is not None
    ]
    return Axis(first=record.steps[0].step, last=record.steps[-1].step, marks=marks)


def _of_steps(record: RunRecord, value: Callable[[StepReport], float]) -> list[Point]:
    return thin([line.step for line in record.steps], [value(line) for line in record.steps])


def _of_evaluations(record: RunRecord, metric: str) -> list[Point]:
    found = [(line.step, line.evaluation[metric]) for line in record.evaluations if metric in line.evaluation]
    return thin([step for step, _ in found], [float(value) for _, value in found])


def _loss(record: RunRecord, axis: Axis) -> Chart:
    steps = [line.step for line in record.steps]
    losses = [line.loss for line in record.steps]
    window = min(50.0, max(2.0, len(losses) / 40))
    lines = [
        Line(name="each step", points=thin(steps, losses), style="faint", silent=True),
        Line(name="training", points=thin(steps, smooth(losses, 1 - 1 / window))),
        Line(name="evaluation", points=_of_evaluations(record, "loss"), color=2, style="dots"),
    ]
    return draw("loss", lines, axis, hint="nats per target, smoothed; pale: each step")


def _metrics(record: RunRecord, axis: Axis) -> list[Chart]:
    """Curves of evaluations along the way; a single one is told by its table."""
    if len(record.evaluations) < 2:
        return []
    found = []
    shares = [
        Line(name=name.replace("_", " "), points=points, color=number, style="dots")
        for number, name in enumerate(_SHARES, start=1)
        if (points := _of_evaluations(record, name))
    ]
    if shares:
        found.append(draw("evaluation", shares, axis, text=partial(_decimals, 4)))
    for name, title in _OTHERS:
        if points := _of_evaluations(record, name):
            found.append(draw(title, [Line(name=title, points=points, color=2, style="dots")], axis))
    return found


def _curve(
    record: RunRecord, axis: Axis, title: str, value: Callable[[StepReport], float], *, hint: str = ""
) -> Chart:
    return draw(title, [Line(name=title, points=_of_steps(record, value))], axis, hint=hint, from_zero=True)


def _data_wait(record: RunRecord, axis: Axis) -> Chart:
    points = _of_steps(record, lambda line: line.data_wait_s / line.step_s)
    whole = sum(line.data_wait_s for line in record.steps) / sum(line.step_s for line in record.steps)
    line = Line(name="data wait", points=points)
    readout = f"{percent(whole)} of all time"
    return draw("data wait", [line], axis, hint="share of a step", readout=readout, from_zero=True, text=percent)


def _stalls(record: RunRecord, axis: Axis) -> Chart:
    stalls = [(line.step, line.checkpoint_stall_s) for line in record.steps if line.checkpoint_stall_s > 0]
    points = thin([step for step, _ in stalls], [stall for _, stall in stalls]) or [
        Point(step=axis.first, value=0.0, low=0.0, high=0.0)
    ]
    readout = f"median {duration(statistics.median(stall for _, stall in stalls))}" if stalls else "none yet"
    line = Line(name="stall", points=points, style="dots")
    hint = "time a checkpoint holds training up"
    return draw("checkpoint stall", [line], axis, hint=hint, readout=readout, from_zero=True, text=duration)


def _memory(record: RunRecord, axis: Axis) -> Chart:
    largest = max(line.memory_bytes for line in record.steps)
    unit, size = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    line = Line(name="memory", points=_of_steps(record, lambda line: line.memory_bytes / size))
    text = partial(_with_unit, unit)
    return draw("memory", [line], axis, hint="of the first worker", from_zero=True, text=text)


def _staleness(record: RunRecord, axis: Axis) -> list[Chart]:
    """Of runs with a parameter server in which updates overtook each other."""
    if not any(line.staleness for line in record.steps):
        return []
    mean = statistics.fmean(line.staleness for line in record.steps)
    most = max(line.staleness for line in record.steps)
    line = Line(name="staleness", points=_of_steps(record, lambda line: line.staleness))
    hint = "updates since the weights of a gradient"
    return [draw("staleness", [line], axis, hint=hint, readout=f"mean {mean:.1f}, most {most}", from_zero=True)]


def _with_unit(unit: str, value: float) -> str:
    return f"{short(value)} {unit}"


def _decimals(digits: int, value: float) -> str:
    return f"{value:.{digits}f}" if abs(value) >= 0.001 or value == 0 else short(value)


def throughput(steps: Sequence[StepReport]) -> float:
    """Median tokens per second."""
    return statistics.median(line.tokens_per_s for line in steps)
