"""A strategy spec, a task and the workers in, the strategy that trains out; what cannot work is refused."""

from dataclasses import dataclass

from torch import nn

from cluster.errors import PlanError
from train_jobs.trainer.duration import num_micro_batches
from train_jobs.trainer.layers import (
    compile_layers,
    layer_matrices,
    matrix_flops_per_position,
    recompute_activations,
    trained_parameters,
)
from train_jobs.trainer.spec import Fsdp, Hsdp, Pipeline, TrainSpec, data_workers
from train_jobs.trainer.strategies.pipelined import Pipelined, check_pipeline
from train_jobs.trainer.strategies.replicated import Replicated
from train_jobs.trainer.strategies.sharded import Sharded
from train_jobs.trainer.strategies.strategy import Forward, Strategy
from train_jobs.trainer.task import PipelineTask, Task
from train_jobs.trainer.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A model spread over the workers, and what was known of it when it was whole."""

    strategy: Strategy
    layer_matrices: frozenset[str]
    flops_per_position: float


def check_fits(spec: TrainSpec, task: Task, num_workers: int) -> None:
    """Raises PlanError when the spec, the task and this number of workers do not go together."""
    if spec.optimizer.kind == "adamw8bit" and isinstance(spec.strategy, Fsdp | Hsdp):
        raise PlanError(
            f"optimizer.kind: adamw8bit with strategy {spec.strategy.kind}: its states are quantized in "
            "blocks that another number of workers would cut otherwise; choose adamw, or ddp"
        )
    num_micro = num_micro_batches(spec.batch, data_workers(spec.strategy, num_workers))
    if not isinstance(spec.strategy, Pipeline):
        return
    if not isinstance(task, PipelineTask):
        raise PlanError(
            f"strategy pipeline: {type(task).__name__} does not say how its model is cut into stages; "
            "choose fsdp to spread a large model"
        )
    check_pipeline(spec.strategy, num_workers, num_micro)


def spread(spec: TrainSpec, task: Task, world: World) -> Spread:
    """Build the model and spread it; PlanError when this model cannot be cut as asked."""
    model = task.build_model(spec)
    model.train()
    if not trained_parameters(model):
        raise PlanError("model: no parameter requires a gradient; there is nothing to train")
    matrices, flops = layer_matrices(model), matrix_flops_per_position(model)
    if spec.activation_checkpointing:
        recompute_activations(model)
    if spec.compile:
        compile_layers(model)
    return Spread(strategy=_strategy(spec, task, model, world), layer_matrices=matrices, flops_per_position=flops)


def _strategy(spec: TrainSpec, task: Task, model: nn.Module, world: World) -> Strategy:
    forward = Forward(task, seed=spec.seed, precision=spec.precision, device=world.device)
    match spec.strategy:
        case Pipeline():
            assert isinstance(task, PipelineTask)
            return Pipelined(model, task, forward, world, spec)
        case Fsdp() if world.size > 1:
            return Sharded(model, forward, world, world.size)
        case Hsdp(shard_workers=shard_workers) if world.size > 1:
            return Sharded(model, forward, world, shard_workers)
        case _:
            return Replicated(model, forward, world)
