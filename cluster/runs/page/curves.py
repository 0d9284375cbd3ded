"""Curves that a screen can show: thousands of steps in, a few hundred points, round ticks and short numbers out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

MAX_POINTS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A run of neighbouring steps as one point; ``low`` and ``high`` are the smallest and largest value in it."""

    step: int
    """The last of them."""
    value: float
    """Their mean."""
    low: float
    high: float


def thin(steps: Sequence[int], values: Sequence[float], max_points: int = MAX_POINTS) -> list[Point]:
    """At most ``max_points`` points, each of equally many steps, the last of fewer."""
    size = max(1, math.ceil(len(steps) / max_points))
    points = []
    for start in range(0, len(steps), size):
        part = values[start : start + size]
        last = min(start + size, len(steps)) - 1
        points.append(Point(step=steps[last], value=math.fsum(part) / len(part), low=min(part), high=max(part)))
    return points


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential average that keeps ``weight`` of the one before, without the pull of a start at zero."""
    found: list[float] = []
    total, kept = 0.0, 0.0
    for value in values:
        total, kept = weight * total + (1 - weight) * value, weight * kept + (1 - weight)
        found.append(total / kept)
    return found


def round_ticks(low: float, high: float, max_ticks: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, ``max_ticks`` + 1 at most; ``low`` alone if they are equal."""
    if not high > low:
        return [low]
    rough = (high - low) / max_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number in at most seven characters: ``0.0421``, ``1.25e-5``, ``18.4k``."""
    size = abs(value)
    if value == 0:
        return "0"
    if size < 1e-3:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    for limit, divisor, unit in ((1e4, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (math.inf, 1e9, "G")):
        if size < limit:
            return f"{_three_digits(value / divisor)}{unit}"
    raise AssertionError("unreachable: the last limit is infinite")


def _three_digits(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:.0f}"
    text = f"{value:.3g}"
    return f"{float(text):.0f}" if "e" in text else text


def percent(ratio: float) -> str:
    """A share as ``12.3 %``; a very small one as ``0.002 %``."""
    if 0 < ratio < 0.001:
        return f"{Decimal(f'{100 * ratio:.1g}'):f} %"  # without an exponent
    return f"{100 * ratio:.1f} %" if ratio < 0.9995 else "100 %"


def duration(seconds: float) -> str:
    """``0.84 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 d 4 h``."""
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds else "0 s"
    whole = round(seconds)
    for size, unit, smaller, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {small_unit}" if rest else "")
    return f"{whole} s"
