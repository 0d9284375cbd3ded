"""One attempt of a run on one worker: a state between two steps in, the state after the next step out."""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_jobs.trainer.batches import Feed
from train_jobs.trainer.checkpoint import Checkpoints
from train_jobs.trainer.committed import Evaluation, Meta, awaiting_evaluation, checkpoint_directory, rated
from train_jobs.trainer.duration import evaluation_due, save_due
from train_jobs.trainer.errors import TrainingError
from train_jobs.trainer.gradients import finish_gradients
from train_jobs.trainer.hooks import Hooks, TrainResult, as_evaluated
from train_jobs.trainer.meters import EvaluationLog, Meter
from train_jobs.trainer.schedules import learning_rate_factor
from train_jobs.trainer.spec import TrainSpec, defining_fields
from train_jobs.trainer.state import TrainState
from train_jobs.trainer.strategies.strategy import Strategy, Sums
from train_jobs.trainer.task import MicroBatch, Task
from train_jobs.trainer.world import World

_MOST_AWAITING = 2
"""Checkpoints that may wait for their evaluation, with the one that is being evaluated; then training waits."""
_LOOK_AGAIN_S = 0.2


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
    """Everything one attempt works with."""

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
    evaluates: bool
    """Whether these workers evaluate; else somebody does that with the checkpoints."""
    evaluations: EvaluationLog | None
    """Where this worker writes them."""
    resumed_from: int | None
    damaged: tuple[str, ...]
    step: int
    """Steps done."""
    loss: float | None = None

    def run(self) -> TrainResult:
        """Step after step, until the last one or until somebody wants to stop; everything is saved then."""
        self.strategy.updated(self.step)
        stopping = False
        while self.step < self.num_steps and not stopping:
            stopping = self._step()
        self._announce(self.checkpoints.wait())
        result = TrainResult(
            outcome="finished" if self.step >= self.num_steps else "stopped",
            step=self.step,
            num_steps=self.num_steps,
            resumed_from=self.resumed_from,
            damaged=self.damaged,
            loss=self.loss,
            checkpoint=checkpoint_directory(self.checkpoints.root, self.step),
            best_checkpoint=None,
            metrics={},
        )
        return as_evaluated(result, self.spec)

    def close(self) -> None:
        """End threads and files."""
        if self.feed is not None:
            self.feed.close()
        self.checkpoints.close()
        self.meter.close()
        if self.evaluations is not None:
            self.evaluations.close()

    def _step(self) -> bool:
        """One optimizer step and what follows it; returns whether to stop."""
        step = self.step
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
        self.step = step + 1
        stall_s = self._evaluate_and_save(stopping=stopping)
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
            step=self.step,
        )
        rate = self.state.optimizers.step(learning_rate_factor(self.spec.schedule, self.step, self.num_steps))
        for parameter in parameters:
            parameter.grad = None
        if self.state.average is not None:
            self.state.average.update()
        return norm, rate

    def _evaluate_and_save(self, *, stopping: bool) -> float:
        """What is due after this step; returns the seconds that saving held training up."""
        due = self.spec.evaluation is not None and evaluation_due(self.spec.evaluation, self.step, self.num_steps)
        evaluation = self._evaluate() if due and self.evaluates else None
        if not (stopping or save_due(self.spec, self.step, self.num_steps)):
            return 0.0
        began = time.perf_counter()
        self._announce(self.checkpoints.wait())
        if due and not self.evaluates:
            self._let_evaluations_catch_up()
        meta = Meta(
            step=self.step,
            to_evaluate=due,
            defining=defining_fields(self.spec),
            num_workers=self.world.size,
            strategy=self.spec.strategy.kind,
        )
        self.checkpoints.save(self.state.tensors(), meta, evaluation)
        return time.perf_counter() - began

    def _evaluate(self) -> Evaluation:
        assert self.spec.evaluation is not None
        with self.state.average.in_place() if self.state.average is not None else nullcontext():
            metrics = self.strategy.evaluate(self.task, self.evaluation_data)
        evaluation = rated(metrics, self.spec.evaluation.metric)
        if self.evaluations is not None:
            self.evaluations.write(self.step, evaluation.metrics)
        self.hooks.on_evaluation(self.step, evaluation)
        return evaluation

    def _let_evaluations_catch_up(self) -> None:
        """Checkpoints that wait for their evaluation stay, so there must not be ever more of them."""
        while len(awaiting_evaluation(self.checkpoints.root)) >= _MOST_AWAITING:
            if self.hooks.should_stop() != "no":
                return
            self.hooks.waiting()
            time.sleep(_LOOK_AGAIN_S)

    def _announce(self, path: Path | None) -> None:
        if path is not None:
            self.hooks.on_checkpoint(path)


def mean_loss(totals: Totals, step: int) -> float:
    """Of all targets of the step; TrainingError when there are none, or it is not finite."""
    if not totals.targets:
        raise TrainingError(f"step {step}: none of its sequences has a target to learn; look at the loss mask")
    loss = totals.loss / totals.targets
    if not math.isfinite(loss):
        raise TrainingError(f"step {step}: the loss is {loss}; lower optimizer.lr, or look at the data")
    return loss
