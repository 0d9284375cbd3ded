"""pipeline: layers are cut over workers, and micro-batches flow through them (1F1B or interleaved)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from cluster.errors import PlanError
from train_jobs.trainer.batches import Share
from train_jobs.trainer.duration import num_micro_batches
from train_jobs.trainer.layers import persistent_buffers, trained_parameters
from train_jobs.trainer.spec import Pipeline, TrainSpec
from train_jobs.trainer.strategies.gradient_sum import GradientSum
from train_jobs.trainer.strategies.strategy import Forward, Lockstep, LossSum, Sums, evaluating
from train_jobs.trainer.task import LossParts, MicroBatch, PipelineTask, Task
from train_jobs.trainer.world import World


def check_pipeline(strategy: Pipeline, num_workers: int, num_micro: int) -> None:
    """Raises PlanError when a step has too few micro-batches, or not the right number, for the schedule."""
    depth = num_workers // strategy.data_parallel
    if num_micro < depth:
        raise PlanError(
            f"strategy pipeline: {num_micro} micro-batches per step for {depth} workers in a row; "
            f"allowed: {depth} or more; raise batch.sequences, or lower batch.micro_sequences"
        )
    if strategy.schedule == "interleaved" and num_micro % depth:
        raise PlanError(
            f"strategy.schedule: interleaved needs a multiple of {depth} micro-batches per step, not {num_micro}; "
            "change batch.micro_sequences, or choose 1f1b"
        )


class Pipelined(Lockstep):
    """Rank = pipeline * depth + place; a worker holds stages ``place``, ``place + depth`` ... of its pipeline."""

    def __init__(self, model: nn.Module, task: PipelineTask, forward: Forward, world: World, spec: TrainSpec) -> None:
        assert isinstance(spec.strategy, Pipeline)
        self._task, self._forward, self._world, self._spec = task, forward, world, spec
        shape = (spec.strategy.data_parallel, world.size // spec.strategy.data_parallel)
        mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("data", "stage"))
        self._depth, self._place = shape[1], world.rank % shape[1]
        self._stage_group = mesh.get_group("stage")
        self.share: Share | None = Share(world.rank // shape[1], shape[0])
        num_stages = self._depth * spec.strategy.stages_per_worker
        parts = task.pipeline_parts(model, num_stages)
        assert len(parts) == num_stages, "this is a bug of the task"
        _check_nothing_shared(parts)
        mine = {number: parts[number].to(world.device) for number in range(self._place, num_stages, self._depth)}
        self.parameters: Mapping[str, nn.Parameter] = {
            name: parameter for part in mine.values() for name, parameter in trained_parameters(part).items()
        }
        self.buffers: Mapping[str, torch.Tensor] = {
            name: buffer for part in mine.values() for name, buffer in persistent_buffers(part).items()
        }
        self._sum = GradientSum(list(self.parameters.values()), mesh.get_group("data")) if shape[0] > 1 else None
        self._losses, self._micro_batches = LossSum(), list[MicroBatch]()
        self._num_micro = num_micro_batches(spec.batch, shape[0])
        self._schedule = self._make_schedule(mine, num_stages)

    def accumulate(self, micro_batches: list[MicroBatch]) -> Sums:
        """See Strategy."""
        self._losses, self._micro_batches = LossSum(), micro_batches
        inputs = [self._task.pipeline_inputs(micro_batch) for micro_batch in micro_batches]
        shared: dict[str, Any] = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
        rows_B = torch.arange(len(micro_batches) * self._spec.batch.micro_sequences)
        first = (torch.cat([one["token_ids_BS"] for one in micro_batches]),) if self._place == 0 else ()
        target: dict[str, Any] = {"target": rows_B} if self._place == self._depth - 1 else {}
        self._schedule.step(*first, **target, rows_B=rows_B, **shared, return_outputs=False)
        if self._sum is not None:
            self._sum.arm()
            self._sum.finish()
        return self._losses.sums(micro_batches if self._place == self._depth - 1 else [])

    def sum_squares(self, squares: torch.Tensor) -> torch.Tensor:
        """Over the stages of one pipeline."""
        dist.all_reduce(squares, group=self._stage_group)
        return squares

    def evaluate(self, task: Task, data: Any) -> Mapping[str, Any]:
        """See Strategy. Every worker gathers the whole model for it, which must fit into its memory."""
        held = {name: tensor.detach() for name, tensor in (*self.parameters.items(), *self.buffers.items())}
        gathered: list[dict[str, torch.Tensor]] = [{}] * self._depth
        on_host = {name: tensor.cpu() for name, tensor in held.items()}
        dist.all_gather_object(gathered, on_host, group=self._stage_group)
        whole = task.build_model(self._spec)
        whole.load_state_dict({name: tensor for part in gathered for name, tensor in part.items()}, strict=False)
        whole.to(self._world.device)
        with evaluating(whole), self._forward.precision():
            return task.evaluate(whole, data)

    def _make_schedule(
        self, mine: Mapping[int, nn.Module], num_stages: int
    ) -> Schedule1F1B | ScheduleInterleaved1F1B:
        device = self._world.device
        self._stages = [_Stage(part, number, self._forward, self._micro_batch) for number, part in mine.items()]
        stages = [
            PipelineStage(stage, stage.number, num_stages, device, group=self._stage_group) for stage in self._stages
        ]
        settings: dict[str, Any] = {
            "n_microbatches": self._num_micro,
            "loss_fn": self._loss,
            "scale_grads": False,  # losses are sums
        }
        if len(stages) == 1:
            return Schedule1F1B(stages[0], **settings)
        return ScheduleInterleaved1F1B(list(stages), **settings)

    def _micro_batch(self, rows_B: torch.Tensor) -> MicroBatch:
        return self._micro_batches[int(rows_B[0]) // self._spec.batch.micro_sequences]

    def _loss(self, output: torch.Tensor, rows_B: torch.Tensor) -> torch.Tensor:
        micro_batch = self._micro_batch(rows_B)
        with self._forward.precision():
            parts: LossParts = self._task.pipeline_loss(output, micro_batch)
        self._losses.add(micro_batch, parts)  # the first one may come twice: torch runs it before for its shapes
        return parts.sum


class _Stage(nn.Module):
    """A stage that computes in the spec's precision, with random numbers of its own for every micro-batch."""

    def __init__(
        self, part: nn.Module, number: int, forward: Forward, find: Callable[[torch.Tensor], MicroBatch]
    ) -> None:
        super().__init__()
        self.part = part
        self.number = number
        self._forward = forward
        self._find = find

    def forward(self, x: torch.Tensor, *, rows_B: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """``rows_B`` are the micro-batch's rows in the worker's share."""
        self._forward.seed(self._find(rows_B), stage=self.number)
        with self._forward.precision():
            output: torch.Tensor = self.part(x, **inputs)
        return output


def _check_nothing_shared(parts: Any) -> None:
    owners: dict[int, int] = {}
    for number, part in enumerate(parts):
        for name, parameter in part.named_parameters():
            owner = owners.setdefault(id(parameter), number)
            if owner != number:
                raise PlanError(
                    f"strategy pipeline: {name} belongs to stages {owner} and {number}, as the model ties them; "
                    "untie them (tie_word_embeddings: false), or choose fsdp"
                )
