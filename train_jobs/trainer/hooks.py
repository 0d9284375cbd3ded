"""What passes between the trainer and its surroundings: hooks it calls, and the result it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from cluster.runs.log import StepReport
from train_jobs.trainer.committed import Evaluation, best_steps, checkpoint_directory, read_evaluation
from train_jobs.trainer.spec import TrainSpec

StopRequest = Literal["no", "checkpoint_and_stop"]


class Hooks(Protocol):
    """What the trainer tells its surroundings, and asks of them. Called on every worker, on the training thread.

    With strategy parameter_server, steps and checkpoints are told to the first worker only.
    """

    def on_step(self, report: StepReport) -> None:
        """A step is done."""

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """The workers have measured the model after ``step`` steps."""

    def on_checkpoint(self, path: Path) -> None:
        """A checkpoint is committed; all workers that save are told after the same step."""

    def should_stop(self) -> StopRequest:
        """Asked once a step; one worker that wants to stop stops all, after the same step."""

    def heartbeat(self, step: int) -> None:
        """0-based step ``step`` begins."""

    def waiting(self) -> None:
        """Nothing is to do until another worker gives out the next step, or evaluations have caught up."""


class NoHooks:
    """Nobody listens, and nobody stops the run."""

    def on_step(self, report: StepReport) -> None:
        """Nothing happens."""

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Nothing happens."""

    def on_checkpoint(self, path: Path) -> None:
        """Nothing happens."""

    def should_stop(self) -> StopRequest:
        """Never."""
        return "no"

    def heartbeat(self, step: int) -> None:
        """Nothing happens."""

    def waiting(self) -> None:
        """Nothing happens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What an attempt leaves."""

    outcome: Literal["finished", "stopped"]
    step: int
    """Steps done, those of earlier attempts included."""
    num_steps: int
    resumed_from: int | None
    """Steps that were done when this attempt began; None when it began anew."""
    damaged: tuple[str, ...]
    """What was wrong with checkpoints newer than the one that was resumed from."""
    loss: float | None
    """Of the last step of this attempt; None when it had nothing left to do."""
    checkpoint: Path
    """After ``step`` steps."""
    best_checkpoint: Path | None
    """The one with the best metric so far, where the best are kept."""
    metrics: Mapping[str, Any]
    """Of the evaluation after ``step`` steps; empty where there was none."""


def as_evaluated(result: TrainResult, spec: TrainSpec) -> TrainResult:
    """The result with what its checkpoints say about their evaluations by now."""
    evaluation = read_evaluation(result.checkpoint)
    root, mode = result.checkpoint.parent, "min" if spec.evaluation is None else spec.evaluation.mode
    best = best_steps(root, mode) if spec.checkpoint.keep_best else []
    return replace(
        result,
        metrics={} if evaluation is None else evaluation.metrics,
        best_checkpoint=checkpoint_directory(root, best[0]) if best else None,
    )
