"""What every strategy offers the loop: micro-batches in, gradients of the summed loss in place, over all workers."""

import hashlib
import struct
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from train_jobs.trainer.batches import Share
from train_jobs.trainer.task import LossParts, MicroBatch, Task


class Strategy(Protocol):
    """A model spread over the workers; made by ``choosing``."""

    share: Share
    """Of every global batch."""
    parameters: Mapping[str, nn.Parameter]
    """The trained ones that this worker holds, by their names in the whole model."""
    buffers: Mapping[str, torch.Tensor]
    counts_batch: bool
    """Whether this worker is the one of its share that counts the share's tokens."""

    def accumulate(self, micro_batches: list[MicroBatch]) -> tuple[float, float]:
        """Forward and backward passes; afterwards every ``grad`` is that of the loss summed over the global batch.

        Returns this worker's own part of that sum, and its number of targets.
        """

    def sum_squares(self, squares: torch.Tensor) -> torch.Tensor:
        """Sum a scalar over the workers that hold the other parts of one copy of the model."""

    def evaluate(self, task: Task, data: Any) -> Mapping[str, Any]:
        """Metrics of the model as it is; every worker gets the same."""


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

    def totals(self) -> tuple[float, float]:
        """Sum of losses and number of targets, added in float64."""
        if not self._parts:
            return 0.0, 0.0
        sums, counts = zip(*self._parts.values(), strict=True)
        return float(torch.stack(sums).double().sum()), float(torch.stack(counts).double().sum())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode and keeps no gradients inside the block."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
