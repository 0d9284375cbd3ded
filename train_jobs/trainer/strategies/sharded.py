"""fsdp and hsdp: weights, gradients and optimizer states are cut over workers; layers are gathered to compute."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from train_jobs.trainer.batches import Share
from train_jobs.trainer.layers import persistent_buffers, repeated_layers, trained_parameters
from train_jobs.trainer.strategies.strategy import Forward, Lockstep, LossSum, Sums, evaluating
from train_jobs.trainer.task import MicroBatch, Task
from train_jobs.trainer.world import World


class Sharded(Lockstep):
    """Groups of ``shard_workers`` neighbours hold one copy of the model; gradients are summed over all groups."""

    def __init__(self, model: nn.Module, forward: Forward, world: World, shard_workers: int) -> None:
        self._forward = forward
        shape = (world.size // shard_workers, shard_workers)
        if shape[0] == 1:
            mesh = init_device_mesh(world.device.type, shape[1:], mesh_dim_names=("shard",))
        else:
            mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
        self._shard_group = mesh.get_group("shard")
        for module in (*repeated_layers(model).values(), model):
            fully_shard(module, mesh=mesh, mp_policy=forward.shard_policy())
        self._cut = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for cut in self._cut:
            cut.set_gradient_divide_factor(1.0)  # losses are sums, and so are gradients
            cut.set_force_sum_reduction_for_comms(True)
        self._model = model
        self.share: Share | None = Share(world.rank, world.size)
        self.parameters: Mapping[str, nn.Parameter] = trained_parameters(model)
        self.buffers: Mapping[str, torch.Tensor] = persistent_buffers(model)

    def accumulate(self, micro_batches: list[MicroBatch]) -> Sums:
        """See Strategy. Each pass adds to the cut gradients at once; groups exchange them after the last one."""
        losses = LossSum()
        for number, micro_batch in enumerate(micro_batches, 1):
            self._cut[0].set_requires_all_reduce(number == len(micro_batches))
            parts = self._forward(self._model, micro_batch)
            parts.sum.backward()  # type: ignore[no-untyped-call]
            losses.add(micro_batch, parts)
        return losses.sums(micro_batches)

    def sum_squares(self, squares: torch.Tensor) -> torch.Tensor:
        """Over the workers that share one copy."""
        dist.all_reduce(squares, group=self._shard_group)
        return squares

    def evaluate(self, task: Task, data: Any) -> Mapping[str, Any]:
        """See Strategy; every worker computes the same passes, as each holds a part of every layer."""
        with evaluating(self._model), self._forward.precision():
            metrics = task.evaluate(self._model, data)
        for cut in self._cut:
            cut.reshard()  # what a forward pass alone has gathered would be old after the next change of the weights
        return metrics
