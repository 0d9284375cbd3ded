"""One chart: lines over steps in, the SVG, its labels and what a pointer reads from it out.

Lines are drawn in a square of 1000 by 1000 that the page stretches to its place; text stands beside it as HTML, so
that it has the same size on every screen.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from cluster.runs.page.curves import Point, round_ticks, short

_SIDE = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve; ``style`` is solid, faint, or dots (no line between values that are far apart)."""

    name: str
    points: Sequence[Point]
    color: int = 1
    style: str = "solid"
    silent: bool = False
    """It is not among what a pointer reads, nor in the legend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Steps that all charts of a page have in common, and marks on them: (step, what happened)."""

    first: int
    last: int
    marks: Sequence[tuple[int, str]] = ()

    def at(self, step: float) -> float:
        """Place of a step, 0 to 1000."""
        return _SIDE * (step - self.first) / max(1, self.last - self.first)

    def ticks(self) -> list[tuple[str, float]]:
        """Round steps, and their places from the left, in percent."""
        steps = [step for step in round_ticks(self.first, self.last, 4) if step == int(step)]
        return [(short(step), self.at(step) / 10) for step in steps]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart as the template needs it."""

    title: str
    hint: str
    readout: str
    """What stands beside the title while nobody points: usually the last value."""
    svg: Markup
    ticks: list[tuple[str, float]] = field(default_factory=list)
    """Texts of the vertical axis, and their places from the top, in percent."""
    steps: list[tuple[str, float]] = field(default_factory=list)
    """Texts of the axis of steps, and their places from the left, in percent."""
    legend: list[tuple[str, int]] = field(default_factory=list)
    """Names of lines and their colours, where there is more than one."""
    over: str = "steps"
    """What the horizontal axis counts."""
    readings: str = "[]"
    """JSON for the script: per line its name, and per point the place, the height and the text."""


def draw(
    title: str,
    lines: Sequence[Line],
    axis: Axis,
    *,
    hint: str = "",
    readout: str = "",
    from_zero: bool = False,
    text: Callable[[float], str] = short,
) -> Chart:
    """A chart of ``lines``, at least one of which has a point; ``text`` writes a value."""
    low, high = _limits(lines, from_zero=from_zero)
    ticks = [tick for tick in round_ticks(low, high) if low <= tick <= high]

    def height(value: float) -> float:
        return _SIDE * (1 - (value - low) / (high - low))

    grid = "".join(f'<path class="grid" d="M0 {height(tick):.1f}H1000"/>' for tick in ticks)
    marks = "".join(
        Markup('<path class="mark" d="M{:.1f} 0V1000"><title>{}</title></path>').format(axis.at(step), what)
        for step, what in axis.marks
    )
    drawn = "".join(_draw_line(line, axis, height) for line in lines)
    spoken = [line for line in lines if not line.silent]
    return Chart(
        title=title,
        hint=hint,
        readout=readout or next((text(line.points[-1].value) for line in spoken if line.points), ""),
        svg=Markup(grid + marks + drawn),  # noqa: S704 (numbers of ours, and marks that are escaped above)
        ticks=[(text(tick), height(tick) / 10) for tick in ticks],
        steps=axis.ticks(),
        legend=[(line.name, line.color) for line in spoken if line.points] if len(spoken) > 1 else [],
        readings=json.dumps([_readings(line, axis, height, text) for line in spoken], separators=(",", ":")),
    )


def _limits(lines: Sequence[Line], *, from_zero: bool) -> tuple[float, float]:
    """The smallest and largest value to show, with a little room."""
    low = min(point.low for line in lines for point in line.points)
    high = max(point.high for line in lines for point in line.points)
    if from_zero:
        low = min(low, 0.0)
    if high == low:
        room = abs(high) * 0.1 or 1.0
        return (low, high + room) if from_zero else (low - room, high + room)
    room = (high - low) * 0.06
    return (low if from_zero else low - room), high + room


def _draw_line(line: Line, axis: Axis, height: Callable[[float], float]) -> str:
    if not line.points:
        return ""
    places = [(axis.at(point.step), point) for point in line.points]
    color = f"c{line.color}"
    if line.style == "dots":
        dots = "".join(f"M{x:.1f} {height(point.value):.1f}h0" for x, point in places)
        thread = "L".join(f"{x:.1f} {height(point.value):.1f}" for x, point in places)
        return f'<path class="thread {color}" d="M{thread}"/><path class="dots {color}" d="{dots}"/>'
    band = ""
    if any(point.low < point.high for point in line.points) and not line.silent:
        top = "L".join(f"{x:.1f} {height(point.high):.1f}" for x, point in places)
        bottom = "L".join(f"{x:.1f} {height(point.low):.1f}" for x, point in reversed(places))
        band = f'<path class="band {color}" d="M{top}L{bottom}Z"/>'
    curve = "L".join(f"{x:.1f} {height(point.value):.1f}" for x, point in places)
    if len(places) == 1:
        return f'<path class="dots {color}" d="M{curve}h0"/>'
    return f'{band}<path class="line {line.style} {color}" d="M{curve}"/>'


def _readings(
    line: Line, axis: Axis, height: Callable[[float], float], text: Callable[[float], str]
) -> dict[str, object]:
    return {
        "name": line.name,
        "color": line.color,
        "points": [
            [point.step, round(axis.at(point.step) / 10, 2), round(height(point.value) / 10, 2), text(point.value)]
            for point in line.points
        ],
    }
