"""A training run from its directory: a spec, a task and data in, checkpoints, a log and a result out.

Start: check, find the newest whole checkpoint, build, load. Run: steps (attempt.py). Stop: after the last step, or
when a hook asks for it, with everything saved. An attempt that dies is continued by the next one.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cluster.errors import PlanError
from train_jobs.trainer.attempt import Attempt
from train_jobs.trainer.averaging import WeightAverage
from train_jobs.trainer.batches import Feed, Readable, Share
from train_jobs.trainer.checkpoint import Checkpoints
from train_jobs.trainer.committed import CHECKPOINTS, Meta, checkpoint_directory
from train_jobs.trainer.duration import total_steps
from train_jobs.trainer.errors import CheckpointError
from train_jobs.trainer.hooks import Hooks, TrainResult
from train_jobs.trainer.meters import EvaluationLog, Meter, peak_flops
from train_jobs.trainer.optimizers import Optimizers
from train_jobs.trainer.schedules import check_schedule
from train_jobs.trainer.spec import ParameterServer, TrainSpec, defining_fields
from train_jobs.trainer.state import TrainState
from train_jobs.trainer.strategies.choosing import (
    Spread,
    check_fits,
    computing_worker,
    only_computes,
    spread,
)
from train_jobs.trainer.task import Task
from train_jobs.trainer.world import World


class Trainer:
    """One attempt of a run, by one of its workers."""

    def __init__(
        self,
        *,
        spec: TrainSpec,
        task: Task,
        shards: Readable | Mapping[str, Readable],
        evaluation_data: Any = None,
        run_dir: Path,
        world: World,
        hooks: Hooks,
        evaluates: bool = True,
    ) -> None:
        """``shards`` are the training data, or several sides of one length (chosen, rejected).

        Without ``evaluates``, checkpoints say that they are to be evaluated, and somebody else does that.
        """
        self._spec = spec
        self._task = task
        self._sides: Mapping[str, Readable] = shards if isinstance(shards, Mapping) else {"": shards}
        self._evaluation_data = evaluation_data
        self._run_dir = run_dir
        self._world = world
        self._hooks = hooks
        self._evaluates = evaluates

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        side = next(iter(self._sides.values()))
        return total_steps(
            self._spec.duration,
            self._spec.batch,
            num_sequences=len(side),
            sequence_tokens=side.sequence_tokens,
        )

    def run(self) -> TrainResult:
        """Train to the end, from wherever the run directory stands.

        Raises PlanError for what cannot be, CheckpointError, TrainingError, and whatever task and hooks raise.
        """
        self._check()
        with numerics(self._world.device, deterministic=self._spec.deterministic):
            return self._compute() if only_computes(self._spec, self._world) else self._train()

    def _train(self) -> TrainResult:
        attempt = self._begin()
        try:
            result = attempt.run()
        except Exception as error:
            attempt.strategy.conclude(error)
            raise
        else:
            attempt.strategy.conclude(result)
            return result
        finally:
            attempt.close()

    def _compute(self) -> TrainResult:
        feed = self._feed(Share(0, 1))
        try:
            return computing_worker(self._spec, self._task, self._world, feed, self._hooks).run()
        finally:
            feed.close()

    def _feed(self, share: Share) -> Feed:
        spec = self._spec
        return Feed(self._sides, spec.batch, share, seed=spec.seed, device=self._world.device)

    def _check(self) -> None:
        spec = self._spec
        check_fits(spec, self._task, self._world.size)
        check_schedule(spec.schedule, self.num_steps)
        if spec.evaluation is not None and self._evaluation_data is None:
            raise PlanError("evaluate: there are no evaluation data; give the data a split, or leave evaluate out")
        if not all(len(side) for side in self._sides.values()):
            raise PlanError("data: there is no sequence to train on; look at the preparation's counts")

    def _begin(self) -> Attempt:
        spec, whole, num_steps = self._spec, self._world, self.num_steps
        world = replace(whole, size=1) if isinstance(spec.strategy, ParameterServer) else whole
        mode = spec.evaluation.mode if spec.evaluation is not None else "min"
        checkpoints = Checkpoints(self._run_dir / CHECKPOINTS, spec.checkpoint, mode, world)
        meta, damaged = checkpoints.find()
        step = 0 if meta is None else meta.step
        made = spread(spec, self._task, whole, range(step, num_steps))
        state = _state(spec, made)
        if meta is not None:
            check_same_run(meta, spec, checkpoints.root)
            state.load(checkpoint_directory(checkpoints.root, meta.step))
        dtype = torch.bfloat16 if spec.precision == "bfloat16" else torch.float32
        return Attempt(
            spec=spec,
            task=self._task,
            evaluation_data=self._evaluation_data,
            num_steps=num_steps,
            world=world,
            hooks=self._hooks,
            strategy=made.strategy,
            state=state,
            feed=None if made.strategy.share is None else self._feed(made.strategy.share),
            checkpoints=checkpoints,
            meter=Meter(
                self._run_dir if world.rank == 0 else None,
                first_step=step,
                flops_per_position=made.flops_per_position,
                peak_flops=peak_flops(world.device, dtype) * whole.size,
                device=world.device,
            ),
            evaluates=self._evaluates,
            evaluations=self._evaluation_log(world, step),
            resumed_from=None if meta is None else step,
            damaged=damaged,
            step=step,
        )

    def _evaluation_log(self, world: World, first_step: int) -> EvaluationLog | None:
        writes = self._evaluates and self._spec.evaluation is not None and world.rank == 0
        return EvaluationLog(self._run_dir, first_step=first_step) if writes else None


def _state(spec: TrainSpec, made: Spread) -> TrainState:
    parameters = made.strategy.parameters
    return TrainState(
        parameters=parameters,
        buffers=made.strategy.buffers,
        optimizers=Optimizers(spec.optimizer, parameters, layer_matrices=made.layer_matrices),
        average=None if spec.ema is None else WeightAverage(parameters, spec.ema),
    )


def check_same_run(meta: Meta, spec: TrainSpec, root: Path) -> None:
    """Raises CheckpointError naming each setting that decides the result and has changed since the checkpoint."""
    now = defining_fields(spec)
    changed = [name for name in sorted(now.keys() | meta.defining.keys()) if now.get(name) != meta.defining.get(name)]
    if changed:
        pairs = ", ".join(f"{name} was {meta.defining.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise CheckpointError(f"{root}: checkpoints of another run: {pairs}; use another run directory, or delete it")


@contextmanager
def numerics(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """Torch computes the same bits for the same inputs inside the block, where that is asked for."""
    if not deterministic:
        yield
        return
    if device.type == "cuda" and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        raise PlanError("deterministic: on CUDA, set CUBLAS_WORKSPACE_CONFIG=:4096:8 before the process starts")
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
