"""What every strategy offers the loop: micro-batches in, gradients of the summed loss in place, over all workers."""

import hashlib
import struct
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from train_jobs.trainer.batches import Share, count_positions
from train_jobs.trainer.hooks import TrainResult
from train_jobs.trainer.task import LossParts, MicroBatch, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What one worker adds to the totals of a step."""

    loss: float
    targets: float
    tokens: int
    """Real ones, counted by one worker of each share."""
    positions: int
    staleness: int = 0
    """Updates since the weights that the gradient was computed on."""
    stop: bool = False
    """Another worker, which does not take part in the totals, wants the run to save and end."""


class Strategy(Protocol):
    """A model spread over the workers; made by ``choosing``."""

    share: Share | None
    """Of every global batch; None where others compute."""
    parameters: Mapping[str, nn.Parameter]
    """The trained ones that this worker holds, by their names in the whole model."""
    buffers: Mapping[str, torch.Tensor]

    def accumulate(self, micro_batches: list[MicroBatch]) -> Sums:
        """Forward and backward passes; afterwards every ``grad`` is that of the loss summed over a global batch.

        Returns this worker's own part of the sums.
        """

    def sum_squares(self, squares: torch.Tensor) -> torch.Tensor:
        """Sum a scalar over the workers that hold the other parts of one copy of the model."""

    def evaluate(self, task: Task, data: Any) -> Mapping[str, Any]:
        """Metrics of the model as it is; every worker gets the same."""

    def settle(self) -> bool:
        """The run is to end: begin nothing more; returns whether the step under way may be the last one."""

    def updated(self, step: int) -> None:
        """Weights are those after ``step`` steps now; told once before the first step of an attempt, too."""

    def conclude(self, end: TrainResult | Exception) -> None:
        """The attempt has ended so."""


class Lockstep:
    """What strategies have in common whose workers all do the same step at the same time."""

    def settle(self) -> bool:
        """Nothing but the step itself is under way."""
        return True

    def updated(self, step: int) -> None:
        """All know."""

    def conclude(self, end: TrainResult | Exception) -> None:
        """All know."""


class Forward:
    """One forward pass of a task, in the spec's precision, with random numbers that belong to the micro-batch."""

    def __init__(self, task: Task, *, seed: int, precision: str, device: torch.device) -> None:
        self._task = task
        self._seed = seed
        self._autocast = precision == "bfloat16"
        self._device = device

    def __call__(self, model: nn.Module, micro_batch: MicroBatch) -> LossParts:
        """The loss of one micro-batch."""
        self.seed(micro_batch)
        with self.precision():
            return self._task.loss(model, micro_batch)

    def precision(self) -> AbstractContextManager[Any]:
        """Products in bfloat16 within the block where the spec says so; weights, sums and losses stay float32."""
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast)

    def shard_policy(self) -> MixedPrecisionPolicy:
        """Cut weights stay float32, are gathered in bfloat16 where the spec says so, and gradients sum in float32."""
        if not self._autocast:
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def seed(self, micro_batch: MicroBatch, stage: int = 0) -> None:
        """Make what follows draw the numbers of this micro-batch, whoever computes it and whatever came before."""
        key = struct.pack("<4q", self._seed, micro_batch.step, micro_batch.number, stage)
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
        torch.default_generator.manual_seed(number)  # torch.manual_seed would format stacks for every absent device
        if self._device.type == "cuda":
            torch.cuda.manual_seed(number)


class LossSum:
    """Adds up losses of micro-batches on their device; one transfer to the host at the end."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, micro_batch: MicroBatch, parts: LossParts) -> None:
        """Count in one micro-batch; a second loss of the same one replaces the first."""
        self._parts[micro_batch.number] = (parts.sum.detach(), parts.count.detach())

    def sums(self, counted: list[MicroBatch]) -> Sums:
        """Losses and targets of all that was added, in float64, and tokens of the micro-batches ``counted``."""
        tokens, positions = count_positions(counted)
        if not self._parts:
            return Sums(loss=0.0, targets=0.0, tokens=tokens, positions=positions)
        losses, counts = (torch.stack(parts).double().sum() for parts in zip(*self._parts.values(), strict=True))
        return Sums(loss=float(losses), targets=float(counts), tokens=tokens, positions=positions)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode and keeps no gradients inside the block."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
