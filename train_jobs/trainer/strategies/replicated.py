"""single and ddp: every worker has the whole model, and computes its share of the micro-batches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from train_jobs.trainer.batches import Share
from train_jobs.trainer.layers import persistent_buffers, trained_parameters
from train_jobs.trainer.strategies.gradient_sum import GradientSum
from train_jobs.trainer.strategies.strategy import Forward, Lockstep, LossSum, Sums, evaluating
from train_jobs.trainer.task import MicroBatch, Task
from train_jobs.trainer.world import World


class Replicated(Lockstep):
    """The whole model on every worker; gradients are summed over all."""

    def __init__(self, model: nn.Module, forward: Forward, world: World) -> None:
        self._model = model.to(world.device)
        self._forward = forward
        self.share: Share | None = Share(world.rank, world.size)
        self.parameters: Mapping[str, nn.Parameter] = trained_parameters(model)
        self.buffers: Mapping[str, torch.Tensor] = persistent_buffers(model)
        self._sum = GradientSum(list(self.parameters.values()), None) if world.size > 1 else None

    def accumulate(self, micro_batches: list[MicroBatch]) -> Sums:
        """See Strategy."""
        losses = LossSum()
        for number, micro_batch in enumerate(micro_batches, 1):
            parts = self._forward(self._model, micro_batch)
            if self._sum is not None and number == len(micro_batches):
                self._sum.arm()
            parts.sum.backward()  # type: ignore[no-untyped-call]
            losses.add(micro_batch, parts)
        if self._sum is not None:
            self._sum.finish()
        return losses.sums(micro_batches)

    def sum_squares(self, squares: torch.Tensor) -> torch.Tensor:
        """Every worker has all gradients already."""
        return squares

    def evaluate(self, task: Task, data: Any) -> Mapping[str, Any]:
        """See Strategy."""
        with evaluating(self._model), self._forward.precision():
            return task.evaluate(self._model, data)
