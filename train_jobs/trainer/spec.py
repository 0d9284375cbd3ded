"""What one training run is asked to do: resolved values only, as the YAML section made them, without defaults."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_type_hints

import msgspec

from cluster.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sgd:
    """Stochastic gradient descent; ``momentum`` 0 is the plain one, ``nesterov`` needs a momentum."""

    kind: Literal["sgd"] = "sgd"
    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsProp:
    """RMSprop; ``alpha`` is the share of the old mean square kept per step."""

    kind: Literal["rmsprop"] = "rmsprop"
    lr: float
    weight_decay: float
    momentum: float
    alpha: float
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """Adam (decay within the gradient), AdamW (decoupled decay), or AdamW with 8-bit states (needs torchao)."""

    kind: Literal["adam", "adamw", "adamw8bit"]
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Muon:
    """Muon for the matrices of the layers, AdamW (``betas``, ``eps``) for embeddings, heads, norms and biases.

    Updates are scaled to AdamW's size, so ``lr`` means for both what it means for AdamW (arXiv 2502.16982).
    """

    kind: Literal["muon"] = "muon"
    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    betas: tuple[float, float]
    eps: float


OptimizerSpec = Sgd | RmsProp | Adam | Muon


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """Learning rate over the steps: a linear warm-up, then by ``kind``.

    ``final_fraction`` of the learning rate is what linear, cosine and wsd end at; wsd stays constant
    until the last ``decay_steps`` steps. Unused fields are None.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"]
    warmup_steps: int
    final_fraction: float | None
    decay_steps: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """One worker."""

    kind: Literal["single"] = "single"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ddp:
    """Every worker has the whole model; gradients are summed over all."""

    kind: Literal["ddp"] = "ddp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fsdp:
    """Weights, gradients and optimizer states are cut over all workers."""

    kind: Literal["fsdp"] = "fsdp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hsdp:
    """Groups of ``shard_workers`` workers share one copy as fsdp does; the groups are replicas."""

    kind: Literal["hsdp"] = "hsdp"
    shard_workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Layers are cut over the workers; ``data_parallel`` such pipelines run side by side.

    How many micro-batches flow through one in a step follows from the batch. ``interleaved`` gives each
    worker ``stages_per_worker`` slices that are not neighbours; with ``1f1b`` that is 1.
    """

    kind: Literal["pipeline"] = "pipeline"
    schedule: Literal["1f1b", "interleaved"]
    data_parallel: int
    stages_per_worker: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterServer:
    """The first worker holds the weights and updates them; the others compute gradients, each at its own pace.

    ``max_staleness`` is the most updates that may lie between the weights a gradient was computed on and its own
    update; None sets no bound.
    """

    kind: Literal["parameter_server"] = "parameter_server"
    max_staleness: int | None


StrategySpec = Single | Ddp | Fsdp | Hsdp | Pipeline | ParameterServer


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSpec:
    """Sequences of one step over all workers, and of one forward pass of one worker."""

    sequences: int
    micro_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DurationSpec:
    """How long: passes over the data, optimizer steps, or tokens (padding included)."""

    kind: Literal["epochs", "steps", "tokens"]
    amount: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSpec:
    """A checkpoint every so many steps and after the last one; the newest and the best so many are kept."""

    every_steps: int
    keep_last: int
    keep_best: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSpec:
    """Evaluation every so many steps (None: after the last one only); ``metric`` decides which one is best."""

    every_steps: int | None
    metric: str
    mode: Literal["min", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """Everything the trainer is told, besides the task and the data themselves."""

    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    strategy: StrategySpec
    batch: BatchSpec
    duration: DurationSpec
    checkpoint: CheckpointSpec
    evaluation: EvaluationSpec | None
    precision: Literal["float32", "bfloat16"]
    clip_norm: float | None
    """Largest norm of the gradient of the mean loss, over all parameters."""
    ema: float | None
    """Share of the averaged weights kept per step."""
    activation_checkpointing: bool
    compile: bool
    deterministic: bool
    seed: int
    data_digest: str


FREE_TO_CHANGE = ("strategy", "checkpoint", "activation_checkpointing", "compile", "deterministic")
"""Fields of a run that may differ between its attempts: they decide how a result is reached, not which one."""


def defining_fields(spec: TrainSpec) -> dict[str, Any]:
    """What decides the result, as JSON values by dotted path: attempts of one run must agree on it."""
    fields = asdict(spec)
    for name in FREE_TO_CHANGE:
        del fields[name]
    del fields["batch"]["micro_sequences"]
    found: dict[str, Any] = {}
    _flatten("", fields, found)
    return found


def _flatten(prefix: str, value: Any, found: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _flatten(f"{prefix}.{name}" if prefix else name, inner, found)
    else:
        found[prefix] = list(value) if isinstance(value, tuple) else value


def data_workers(strategy: StrategySpec, num_workers: int) -> int:
    """Shares into which ``num_workers`` workers cut a global batch; PlanError where they cannot form the strategy."""
    match strategy:
        case Single():
            if num_workers != 1:
                raise PlanError(f"strategy single: {num_workers} workers; allowed: 1; choose ddp, or set workers: 1")
            return 1
        case Hsdp(shard_workers=shards):
            if shards < 1 or num_workers % shards:
                raise PlanError(
                    f"strategy.shard_workers: {num_workers} workers do not form groups of {shards}; "
                    "set workers to a multiple of it"
                )
            return num_workers
        case Pipeline():
            _check_pipeline(strategy, num_workers)
            return strategy.data_parallel
        case ParameterServer():
            if num_workers < 2:
                raise PlanError(
                    f"strategy parameter_server: {num_workers} worker; allowed: 2 or more, as the first one "
                    "holds the weights and the others compute; set workers to 2, or choose single"
                )
            return 1  # each computes whole batches
        case _:
            return num_workers


def _check_pipeline(strategy: Pipeline, num_workers: int) -> None:
    if strategy.data_parallel < 1 or num_workers % strategy.data_parallel:
        raise PlanError(
            f"strategy.data_parallel: {num_workers} workers do not form {strategy.data_parallel} pipelines; "
            "set workers to a multiple of it"
        )
    if num_workers // strategy.data_parallel < 2:
        raise PlanError(
            f"strategy pipeline: {num_workers // strategy.data_parallel} worker per pipeline; allowed: 2 or more; "
            "add workers, lower data_parallel, or choose ddp"
        )
    if (strategy.stages_per_worker == 1) != (strategy.schedule == "1f1b"):
        raise PlanError(
            f"strategy.stages_per_worker: {strategy.stages_per_worker} with schedule {strategy.schedule}; "
            "allowed: 1 with 1f1b, 2 or more with interleaved"
        )


_OPTIMIZERS: dict[str, type[OptimizerSpec]] = {
    "sgd": Sgd,
    "rmsprop": RmsProp,
    "adam": Adam,
    "adamw": Adam,
    "adamw8bit": Adam,
    "muon": Muon,
}
_STRATEGIES: dict[str, type[StrategySpec]] = {
    "single": Single,
    "ddp": Ddp,
    "fsdp": Fsdp,
    "hsdp": Hsdp,
    "pipeline": Pipeline,
    "parameter_server": ParameterServer,
}


def read_train_spec(values: Mapping[str, Any]) -> TrainSpec:
    """The spec in JSON values, with every field; msgspec.ValidationError when they are none."""
    types = get_type_hints(TrainSpec)
    types["optimizer"] = _OPTIMIZERS[values["optimizer"]["kind"]]
    types["strategy"] = _STRATEGIES[values["strategy"]["kind"]]
    return TrainSpec(**{name: msgspec.convert(values[name], kind) for name, kind in types.items()})
