"""A strategy spec, a task and the workers in, what each of them does out; what cannot work is refused."""

from dataclasses import dataclass

from torch import nn

from cluster.errors import PlanError
from train_jobs.trainer.batches import Feed
from train_jobs.trainer.duration import num_micro_batches
from train_jobs.trainer.hooks import Hooks
from train_jobs.trainer.layers import (
    compile_layers,
    layer_matrices,
    matrix_flops_per_position,
    recompute_activations,
    running_statistics,
    trained_parameters,
)
from train_jobs.trainer.spec import Fsdp, Hsdp, ParameterServer, Pipeline, TrainSpec, data_workers
from train_jobs.trainer.strategies.computing import ComputingWorker
from train_jobs.trainer.strategies.links import SERVER
from train_jobs.trainer.strategies.pipelined import Pipelined, check_pipeline
from train_jobs.trainer.strategies.replicated import Replicated
from train_jobs.trainer.strategies.serving import Server
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


def only_computes(spec: TrainSpec, world: World) -> bool:
    """Whether this worker computes for another one, which alone trains."""
    return isinstance(spec.strategy, ParameterServer) and world.rank != SERVER


def spread(spec: TrainSpec, task: Task, world: World, steps: range) -> Spread:
    """Build the model and spread it, for ``steps`` to come; PlanError when this model cannot be spread as asked."""
    model = _build(spec, task)
    matrices, flops = layer_matrices(model), matrix_flops_per_position(model)
    _prepare(model, spec)
    strategy = _strategy(spec, task, model, world, steps)
    return Spread(strategy=strategy, layer_matrices=matrices, flops_per_position=flops)


def computing_worker(spec: TrainSpec, task: Task, world: World, feed: Feed, hooks: Hooks) -> ComputingWorker:
    """What a worker does that only computes; PlanError when this model cannot be trained so."""
    model = _build(spec, task)
    _prepare(model, spec)
    return ComputingWorker(model, _forward(spec, task, world), world, feed, hooks)


def _build(spec: TrainSpec, task: Task) -> nn.Module:
    model = task.build_model(spec)
    model.train()
    if not trained_parameters(model):
        raise PlanError("model: no parameter requires a gradient; there is nothing to train")
    found = running_statistics(model)
    if isinstance(spec.strategy, ParameterServer) and found is not None:
        raise PlanError(
            f"strategy parameter_server: {found} keeps running statistics of what passes through it, which do not "
            "reach the server; choose ddp"
        )
    return model


def _prepare(model: nn.Module, spec: TrainSpec) -> None:
    if spec.activation_checkpointing:
        recompute_activations(model)
    if spec.compile:
        compile_layers(model)


def _forward(spec: TrainSpec, task: Task, world: World) -> Forward:
    return Forward(task, seed=spec.seed, precision=spec.precision, device=world.device)


def _strategy(spec: TrainSpec, task: Task, model: nn.Module, world: World, steps: range) -> Strategy:
    forward = _forward(spec, task, world)
    match spec.strategy:
        case ParameterServer():
            return Server(model, forward, world, spec, steps)
        case Pipeline():
            assert isinstance(task, PipelineTask)
            return Pipelined(model, task, forward, world, spec)
        case Fsdp() if world.size > 1:
            return Sharded(model, forward, world, world.size)
        case Hsdp(shard_workers=shard_workers) if world.size > 1:
            return Sharded(model, forward, world, shard_workers)
        case _:
            return Replicated(model, forward, world)
