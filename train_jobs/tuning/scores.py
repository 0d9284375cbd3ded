"""The score of a trial: its run's evaluations in, one by one; the metric of what it would publish now out."""

from typing import Literal

from cluster.runs.log import EvaluationReport
from train_jobs.trainer.errors import TrainingError
from train_jobs.trainer.spec import TrainSpec


class Score:
    """Follows one run: its best checkpoint counts where the run keeps it, its last one where it does not."""

    def __init__(self, metric: str, train: TrainSpec) -> None:
        """``metric`` is what trials are compared by; which checkpoint is best is the run's own choice."""
        self._metric = metric
        keeps_best = train.evaluation is not None and train.checkpoint.keep_best > 0
        self._chosen_by = train.evaluation if keeps_best else None
        self._best: float | None = None
        self._score: float | None = None

    def after(self, line: EvaluationReport) -> float:
        """The score once this evaluation is there; TrainingError when it does not have what is compared."""
        value = _read(line, self._metric)
        if self._chosen_by is None or self._score is None:
            better = True
        else:
            better = _is_better(_read(line, self._chosen_by.metric), self._best, self._chosen_by.mode)
        if better:
            self._score = value
            self._best = None if self._chosen_by is None else _read(line, self._chosen_by.metric)
        assert self._score is not None, "the first evaluation is always better"
        return self._score


def _read(line: EvaluationReport, metric: str) -> float:
    if metric not in line.evaluation:
        raise TrainingError(f"metric: the evaluation gives no {metric}; it gives {', '.join(line.evaluation)}")
    return float(line.evaluation[metric])


def _is_better(value: float, best: float | None, mode: Literal["min", "max"]) -> bool:
    return best is None or (value > best if mode == "max" else value < best)
