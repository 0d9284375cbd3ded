"""One attempt of a run on one worker: a state between two steps in, the state after the next step out."""

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train_jobs.trainer.batches import Feed
from train_jobs.trainer.checkpoint import Checkpoints
from train_jobs.trainer.committed import Meta, checkpoint_directory
from train_jobs.trainer.duration import evaluation_due, may_save
from train_jobs.trainer.errors import TrainingError
from train_jobs.trainer.gradients import finish_gradients
from train_jobs.trainer.hooks import Hooks, TrainResult
from train_jobs.trainer.meters import Meter
from train_jobs.trainer.schedules import learning_rate_factor
from train_jobs.trainer.spec import TrainSpec, defining_fields
from train_jobs.trainer.state import TrainState
from train_jobs.trainer.strategies.strategy import Strategy, Sums
from train_jobs.trainer.task import MicroBatch, Task
from train_jobs.trainer.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands between two steps."""

    step: int = 0
    """Steps done."""
    metrics: Mapping[str, Any]
    """Of the evaluation after this step; empty where there was none."""
    score: float | None = None
    best_score: float | None = None
    best_step: int | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums of one step over all workers."""

    loss: float
    targets: float
    tokens: float
    positions: float
    stop: float
    saved: float
    failed: float


@dataclass(kw_only=True)
class Attempt:
    """Everything one attempt works with; ``progress`` is what changes."""

    spec: TrainSpec
    task: Task
    evaluation_data: Any
    num_steps: int
    world: World
    hooks: Hooks
    strategy: Strategy
    state: TrainState
    feed: Feed | None
    """None where others compute."""
    checkpoints: Checkpoints
    meter: Meter
    resumed_from: int | None
    damaged: tuple[str, ...]
    progress: Progress
    loss: float | None = None

    def run(self) -> TrainResult:
        """Step after step, until the last one or until somebody wants to stop; everything is saved then."""
        self.strategy.updated(self.progress.step)
        stopping = False
        while self.progress.step < self.num_steps and not stopping:
            stopping = self._step()
        self._announce(self.checkpoints.wait())
        best = self.progress.best_step
        best_path = None if best is None else checkpoint_directory(self.checkpoints.root, best)
        return TrainResult(
            outcome="finished" if self.progress.step >= self.num_steps else "stopped",
            step=self.progress.step,
            num_steps=self.num_steps,
            resumed_from=self.resumed_from,
            damaged=self.damaged,
            loss=self.loss,
            checkpoint=checkpoint_directory(self.checkpoints.root, self.progress.step),
            best_checkpoint=best_path if best_path is not None and best_path.is_dir() else None,
            metrics=self.progress.metrics,
        )

    def close(self) -> None:
        """End threads and files."""
        if self.feed is not None:
            self.feed.close()
        self.checkpoints.close()
        self.meter.close()

    def _step(self) -> bool:
        """One optimizer step and what follows it; returns whether to stop."""
        step = self.progress.step
        self.hooks.heartbeat(step)
        began = time.perf_counter()
        micro_batches = self._take(step)
        data_wait_s = time.perf_counter() - began
        sums = self.strategy.accumulate(micro_batches)
        totals = self._sum(sums)
        self._announce_saved(totals)
        self.loss = mean_loss(totals, step)
        stopping = totals.stop > 0 and self.strategy.settle()
        grad_norm, rate = self._update(totals)
        self.strategy.updated(step + 1)
        computed = time.perf_counter()
        self.progress = replace(self.progress, step=step + 1, metrics={}, score=None)
        self._evaluate_if_due()
        stall_s = self._save_if_due(stopping=stopping)
        report = self.meter.report(
            step=step + 1,
            num_steps=self.num_steps,
            loss=self.loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            counts=(int(totals.targets), int(totals.tokens), int(totals.positions)),
            step_s=computed - began + stall_s,
            data_wait_s=data_wait_s,
            checkpoint_stall_s=stall_s,
            staleness=sums.staleness,
        )
        self.hooks.on_step(report)
        return stopping

    def _take(self, step: int) -> list[MicroBatch]:
        if self.feed is None:
            return []
        taken = self.feed.take(step)
        self.feed.begin(step + 1)
        return taken

    def _sum(self, sums: Sums) -> Totals:
        stop = self.hooks.should_stop() == "checkpoint_and_stop" or sums.stop
        saved, failed = self.checkpoints.finished, self.checkpoints.failed
        values = [sums.loss, sums.targets, float(sums.tokens), float(sums.positions)]
        return Totals(*self.world.sum([*values, float(stop), float(saved), float(failed)]))

    def _announce_saved(self, totals: Totals) -> None:
        if totals.failed:
            self.checkpoints.wait()
            raise TrainingError("another worker could not save its part of a checkpoint; its log says why")
        if totals.saved == self.world.size:
            self._announce(self.checkpoints.wait())

    def _update(self, totals: Totals) -> tuple[float, float]:
        """Gradients to new weights; returns the gradient's norm and the learning rate."""
        parameters = self.strategy.parameters.values()
        norm = finish_gradients(
            parameters,
            factor=1.0 / totals.targets,
            clip_norm=self.spec.clip_norm,
            sum_squares=self.strategy.sum_squares,
            step=self.progress.step,
        )
        rate = self.state.optimizers.step(
            learning_rate_factor(self.spec.schedule, self.progress.step, self.num_steps)
        )
        for parameter in parameters:
            parameter.grad = None
        if self.state.average is not None:
            self.state.average.update()
        return norm, rate

    def _evaluate_if_due(self) -> None:
        evaluation, step = self.spec.evaluation, self.progress.step
        if evaluation is None or not evaluation_due(evaluation, step, self.num_steps):
            return
        with self.state.average.in_place() if self.state.average is not None else nullcontext():
            metrics = dict(self.strategy.evaluate(self.task, self.evaluation_data))
        if evaluation.metric not in metrics:
            raise TrainingError(
                f"evaluate.metric: the evaluation gives no {evaluation.metric}; it gives {', '.join(metrics)}"
            )
        score = self.world.sum([float(metrics[evaluation.metric]) if self.world.rank == 0 else 0.0])[0]
        self.progress = with_score(self.progress, metrics, score, evaluation.mode)
        self.meter.write_evaluation(step, metrics)

    def _save_if_due(self, *, stopping: bool) -> float:
        """Returns the seconds for which training was held up."""
        progress, wanted = self.progress, self.spec.checkpoint
        best = wanted.keep_best > 0 and progress.best_step == progress.step
        if not (progress.step % wanted.every_steps == 0 or progress.step == self.num_steps or stopping or best):
            return 0.0
        assert stopping or may_save(self.spec, progress.step, self.num_steps)
        began = time.perf_counter()
        self._announce(self.checkpoints.wait())
        meta = Meta(
            step=progress.step,
            metrics=dict(progress.metrics),
            score=progress.score,
            best_score=progress.best_score,
            best_step=progress.best_step,
            defining=defining_fields(self.spec),
            num_workers=self.world.size,
            strategy=self.spec.strategy.kind,
        )
        self.checkpoints.save(self.state.tensors(), meta)
        return time.perf_counter() - began

    def _announce(self, path: Path | None) -> None:
        if path is not None:
            self.hooks.on_checkpoint(path)


def with_score(progress: Progress, metrics: Mapping[str, Any], score: float, mode: str) -> Progress:
    """The progress after an evaluation; of equal scores the first stays the best."""
    before = progress.best_score
    better = before is None or (score > before if mode == "max" else score < before)
    if not better:
        return replace(progress, metrics=metrics, score=score)
    return replace(progress, metrics=metrics, score=score, best_score=score, best_step=progress.step)


def mean_loss(totals: Totals, step: int) -> float:
    """Of all targets of the step; TrainingError when there are none, or it is not finite."""
    if not totals.targets:
        raise TrainingError(f"step {step}: none of its sequences has a target to learn; look at the loss mask")
    loss = totals.loss / totals.targets
    if not math.isfinite(loss):
        raise TrainingError(f"step {step}: the loss is {loss}; lower optimizer.lr, or look at the data")
    return loss
