"""What becomes of a sweep's trials: events of single trials in, the table of all and the best of them out."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from cluster.runs.sweep import Sweep, Trial
from train_jobs.trainer.errors import TrainingError


class Table:
    """The trials so far, by a key of whoever runs them; ``changed`` is told of every new state."""

    def __init__(
        self, sweep: Sweep, changed: Callable[[Sweep], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sweep = sweep
        self._changed = changed
        self._clock = clock
        self._numbers: dict[str, int] = {}
        self._began: dict[str, float] = {}

    @property
    def sweep(self) -> Sweep:
        """As it stands."""
        return self._sweep

    def begin(self, key: str, values: Mapping[str, Any]) -> None:
        """A trial starts; one that is known already starts again."""
        if key in self._numbers:
            return
        self._numbers[key] = len(self._numbers) + 1
        self._began[key] = self._clock()
        trial = Trial(number=self._numbers[key], values=dict(values), status="running")
        self._put((*self._sweep.trials, trial))

    def evaluated(self, key: str, *, run_id: str, step: int, score: float) -> None:
        """A trial has another score."""
        self._update(key, run_id=run_id, step=step, score=score)

    def end(self, key: str, status: Literal["finished", "ended early", "failed"], error: str | None = None) -> None:
        """A trial is over."""
        self._update(key, status=status, error=error)

    def close(self) -> Trial:
        """All are over: the best one, which the sweep names from now on. Errors of :func:`choose_best`."""
        best = choose_best(self._sweep.trials, self._sweep.mode)
        self._put(self._sweep.trials, best=best.number)
        return best

    def published(self, version: str | None) -> None:
        """What became of the best one."""
        self._put(self._sweep.trials, published=version)

    def _update(self, key: str, **values: Any) -> None:
        number = self._numbers[key]
        seconds = round(self._clock() - self._began[key], 1)
        self._put(
            tuple(
                msgspec.structs.replace(trial, seconds=seconds, **values) if trial.number == number else trial
                for trial in self._sweep.trials
            )
        )

    def _put(self, trials: tuple[Trial, ...], **values: Any) -> None:
        self._sweep = msgspec.structs.replace(self._sweep, trials=trials, **values)
        self._changed(self._sweep)


def choose_best(trials: Sequence[Trial], mode: Literal["min", "max"]) -> Trial:
    """The finished trial with the best score, of equal ones the first; TrainingError when none has finished."""
    finished = {trial.score: trial for trial in reversed(trials) if trial.status == "finished"}
    scores = [score for score in finished if score is not None]
    if not scores:
        errors = [f"trial {trial.number}: {trial.error}" for trial in trials if trial.error]
        first = f"; {errors[0]}" if errors else ""
        raise TrainingError(f"none of {len(trials)} trials has finished with a score{first}")
    return finished[max(scores) if mode == "max" else min(scores)]
