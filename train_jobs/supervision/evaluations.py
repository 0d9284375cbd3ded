"""Evaluations beside the training: checkpoints that wait for theirs in; metrics, where all look for them, out.

Runs in the driver. What is to be done stands in the checkpoints, so whoever continues a run continues with it. One at
a time, the oldest first; each is a task of Ray's that asks for nothing, as the workers may have taken all there is,
and computes at a low priority. An evaluation that fails ends the run.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import MantaError
from train_jobs.run_spec import RunSpec
from train_jobs.supervision.cluster_view import quietest_node
from train_jobs.supervision.measuring import measure_beside
from train_jobs.supervision.telemetry import TrainTelemetry
from train_jobs.trainer import committed
from train_jobs.trainer.errors import TrainingError
from train_jobs.trainer.meters import EvaluationLog

logger = logging.getLogger(__name__)

_SLOWER = 10
"""Times that a low priority makes an evaluation slower, at worst: see NICENESS."""


@dataclass(frozen=True, slots=True)
class _Task:
    """The evaluation under way."""

    step: int
    result: Any
    began: float


class Evaluations:
    """Those of one run that its workers leave to others; ``error`` is why there will be no more."""

    def __init__(self, spec: RunSpec, monitor: Any) -> None:
        """``monitor`` is the handle of the Monitor actor."""
        self._spec = spec
        self._monitor = monitor
        self._limit_s = spec.start_timeout_s + _SLOWER * spec.step_timeout_s
        self._log = (
            EvaluationLog(spec.run_dir, first_step=committed.newest_step(spec.checkpoints) or 0)
            if spec.evaluates_beside
            else None
        )
        self._telemetry = TrainTelemetry(spec.job, rank=0)
        self._under_way: _Task | None = None
        self.error: MantaError | None = None

    def advance(self) -> int | None:
        """Take in what is done and start what is next, without waiting; the step whose evaluation is under way."""
        if self._log is None or self.error is not None:
            return None
        if self._under_way is not None:
            self._look_at(self._under_way)
        if self._under_way is None and self.error is None:
            waiting = committed.awaiting_evaluation(self._spec.checkpoints)
            self._under_way = self._start(waiting[0]) if waiting else None
        return None if self._under_way is None else self._under_way.step

    def close(self) -> None:
        """End the one under way; its checkpoint goes on waiting."""
        if self._under_way is not None:
            ray.cancel(self._under_way.result, force=True)
        if self._log is not None:
            self._log.close()

    def _start(self, step: int) -> _Task:
        node = quietest_node()
        task = ray.remote(measure_beside).options(
            num_cpus=0,
            max_retries=self._spec.max_failures,
            scheduling_strategy="DEFAULT" if node is None else NodeAffinitySchedulingStrategy(node, soft=True),
        )
        checkpoint = committed.checkpoint_directory(self._spec.checkpoints, step)
        return _Task(step, task.remote(self._spec, checkpoint), time.monotonic())

    def _look_at(self, task: _Task) -> None:
        if not ray.wait([task.result], timeout=0)[0]:
            if time.monotonic() - task.began > self._limit_s:
                ray.cancel(task.result, force=True)
                self._fail(task, TrainingError(self._too_long(task)))
            return
        try:
            evaluation: committed.Evaluation = ray.get(task.result)
        except ray.exceptions.RayError as error:
            self._fail(task, _as_ours(task.step, error))
        else:
            self._under_way = None
            self._take(task.step, evaluation)

    def _take(self, step: int, evaluation: committed.Evaluation) -> None:
        assert self._log is not None
        self._log.write(step, evaluation.metrics)
        self._telemetry.evaluated(evaluation.metrics)
        self._monitor.evaluated.remote(step, evaluation.score)
        committed.write_evaluation(committed.checkpoint_directory(self._spec.checkpoints, step), evaluation)

    def _fail(self, task: _Task, error: MantaError) -> None:
        logger.error("the evaluation after step %d failed: %s", task.step, error)
        self._under_way, self.error = None, error

    def _too_long(self, task: _Task) -> str:
        return (
            f"the evaluation after step {task.step} took longer than {self._limit_s:g} s, which is timeouts.start "
            f"and {_SLOWER} times timeouts.step; raise timeouts.step, or hold out less data"
        )


def _as_ours(step: int, error: Exception) -> MantaError:
    """What a task raised on purpose, or that it failed."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    if isinstance(cause, MantaError):
        return cause
    return TrainingError(f"the evaluation after step {step} failed: {type(cause).__name__}: {cause}")
