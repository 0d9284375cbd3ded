"""A sweep on the page: its table of trials, and for each setting that is a number how the score went with it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cluster.runs.page.chart import Chart
from cluster.runs.page.curves import duration, round_ticks, short
from cluster.runs.sweep import Sweep, Trial, ranked

_LOGARITHMIC_FROM = 30.0
"""Ratio of the largest to the smallest value from which on orders of magnitude are shown alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One line of the table of trials."""

    number: int
    values: list[str]
    score: str
    share: float
    """Of the bar behind the score, 0 to 1."""
    step: int
    lasted: str
    status: str
    best: bool
    bad: bool


def trial_rows(sweep: Sweep) -> list[TrialRow]:
    """All trials, the best first."""
    scores = [trial.score for trial in sweep.trials if trial.score is not None]
    low, high = (min(scores), max(scores)) if scores else (0.0, 0.0)
    return [
        TrialRow(
            number=trial.number,
            values=[_text(value) for value in trial.values.values()],
            score="" if trial.score is None else f"{trial.score:.4f}",
            share=_share(trial, sweep.mode, low, high),
            step=trial.step,
            lasted=duration(trial.seconds),
            status=f"{trial.status}: {trial.error}" if trial.error else trial.status,
            best=trial.number == sweep.best,
            bad=trial.status == "failed",
        )
        for trial in ranked(sweep)
    ]


def setting_names(sweep: Sweep) -> list[str]:
    """The varied settings, by dotted path."""
    return list(sweep.trials[0].values) if sweep.trials else []


def scatters(sweep: Sweep) -> list[Chart]:
    """Score over each setting that has different numbers in trials that have a score."""
    found = []
    for name in setting_names(sweep):
        points = [
            (float(trial.values[name]), trial.score, trial)
            for trial in sweep.trials
            if trial.score is not None and _is_number(trial.values[name])
        ]
        if len({value for value, _, _ in points}) > 1 and len({score for _, score, _ in points}) > 1:
            found.append(_scatter(name, points, sweep))
    return found


def _scatter(name: str, points: Sequence[tuple[float, float, Trial]], sweep: Sweep) -> Chart:
    values, scores = [value for value, _, _ in points], [score for _, score, _ in points]
    logarithmic = min(values) > 0 and max(values) / min(values) >= _LOGARITHMIC_FROM
    across = _Scale(values, logarithmic=logarithmic)
    up = _Scale(scores, logarithmic=False)
    dots = Markup("").join(
        Markup('<path class="dots {}" d="M{:.1f} {:.1f}h0"><title>{}</title></path>').format(
            "c3" if trial.number == sweep.best else "c1" if trial.status == "finished" else "c2 early",
            1000 * across.at(value),
            1000 * (1 - up.at(score)),
            f"trial {trial.number}: {short(value)}, {score:.4f}",
        )
        for value, score, trial in points
    )
    ticks = [(short(tick), 100 * (1 - up.at(tick))) for tick in up.ticks()]
    grid = Markup("").join(Markup('<path class="grid" d="M0 {:.1f}H1000"/>').format(10 * place) for _, place in ticks)
    return Chart(
        title=name,
        hint=f"{sweep.metric} of each trial" + (", by orders of magnitude" if logarithmic else ""),
        readout="",
        svg=grid + dots,
        ticks=ticks,
        steps=[(short(tick), 100 * across.at(tick)) for tick in across.ticks()],
        over="values",
        legend=[("finished", 1), ("ended early", 2), ("best", 3)],
    )


class _Scale:
    """Numbers to places, 0 to 1, with a little room at both ends."""

    def __init__(self, numbers: Sequence[float], *, logarithmic: bool) -> None:
        self._logarithmic = logarithmic
        low, high = self._read(min(numbers)), self._read(max(numbers))
        room = 0.06 * (high - low)
        self._low, self._high = low - room, high + room

    def at(self, number: float) -> float:
        return (self._read(number) - self._low) / (self._high - self._low)

    def ticks(self) -> list[float]:
        """Round numbers within the scale."""
        if not self._logarithmic:
            return round_ticks(self._low, self._high)
        first, last = math.ceil(self._low), math.floor(self._high)
        return [10.0**power for power in range(first, last + 1)]

    def _read(self, number: float) -> float:
        return math.log10(number) if self._logarithmic else number


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: object) -> str:
    if isinstance(value, float):
        return short(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    return "none" if value is None else str(value)


def _share(trial: Trial, mode: str, low: float, high: float) -> float:
    """The best bar is full, and the worst a tenth."""
    if trial.score is None or high == low:
        return 0.0 if trial.score is None else 1.0
    place = (trial.score - low) / (high - low)
    return 0.1 + 0.9 * (place if mode == "max" else 1 - place)
