"""What a job is asked to do: ``JobPlan.spec`` of the plan in, the frozen types that everything here reads out."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from cluster.config.jobs_train import JobTask
from cluster.errors import PlanError
from cluster.plan.jobs import JobPlan
from cluster.runs import files
from train_jobs.data.spec import PrepareSpec
from train_jobs.tasks.spec import AdapterSpec
from train_jobs.trainer.spec import TrainSpec, defining_fields, read_train_spec

UNKNOWN_DIGEST = ""
"""Of data that are not prepared yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSpec:
    """What training starts from; one of the two is None."""

    source: str | None
    """URI of a model."""
    architecture: dict[str, Any] | None
    """Keys of a transformers ``config.json`` with ``model_type``: random weights, the data's tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoSpec:
    """Of task ``dpo``."""

    beta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishSpec:
    """The registry version that a finished run becomes."""

    model: str
    alias: str
    dtype: Literal["base", "float32", "bfloat16"]
    """Of the published weights; base is that of the model it started from, float32 from scratch."""
    require: dict[str, float]
    """By metric: at least so much where more is better, at most where less is (``METRICS`` of the config says)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersSpec:
    """How many workers, and how long another number must be possible before the run changes to it."""

    min: int
    max: int
    resize_delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourcesSpec:
    """What each worker reserves; it computes on a GPU when it has one, else with ``threads`` threads."""

    cpus: float
    gpus: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeoutsSpec:
    """``start_s`` from the start of the workers to the first step, ``step_s`` from one step to the next."""

    start_s: float
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """A train job."""

    name: str
    task: JobTask
    base: BaseSpec
    data: str
    """The prepare job whose data it learns from."""
    adapter: AdapterSpec | None
    dpo: DpoSpec | None
    """Present with task ``dpo``."""
    publish: PublishSpec | None
    workers: WorkersSpec
    resources: ResourcesSpec
    evaluation_sequences: int
    """Sequences of one forward pass of an evaluation."""
    max_failures: int
    """How often the run goes on by itself after a worker failed."""
    timeouts: TimeoutsSpec
    training: TrainSpec
    """What the trainer is told; ``data_digest`` is UNKNOWN_DIGEST until the data are prepared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceSpec:
    """Values of one setting: both bounds, included (``uniform``, ``log_uniform``, ``integer``), or a choice."""

    kind: Literal["uniform", "log_uniform", "integer", "choice"]
    values: list[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopSpec:
    """ASHA: from ``grace_steps`` on, one of ``keep_one_of`` trials goes on to so many times as many steps."""

    grace_steps: int
    keep_one_of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSpec:
    """A sweep over settings of a train job; ``cluster.plan.jobs.plan_trial`` makes a trial of chosen values."""

    name: str
    job: str
    search: Literal["random", "grid", "tpe"]
    trials: int | None
    """None with grid: every combination."""
    space: dict[str, SpaceSpec]
    """By dotted path (``optimizer.lr``)."""
    metric: str
    mode: Literal["min", "max"]
    stop: StopSpec | None
    concurrent: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessSpec:
    """Tasks of lm-eval."""

    tasks: list[str]
    include: str | None
    """Folder with tasks of the user's."""
    num_fewshot: int | None
    """None: as many as each task says."""
    limit: int | None
    """Documents of each task; None: all."""
    chat_template: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSpec:
    """A model measured on prepared data, or by lm-eval's tasks."""

    name: str
    task: JobTask
    model: str
    """URI."""
    data: str | None
    """None with a harness."""
    split: Literal["eval", "train"] | None
    """None with a harness."""
    harness: HarnessSpec | None
    batch_sequences: int
    resources: ResourcesSpec


def read_prepare(plan: JobPlan) -> PrepareSpec:
    """The spec of a prepare job."""
    return msgspec.convert(plan.spec, PrepareSpec)


def read_job(plan: JobPlan, data_digest: str = UNKNOWN_DIGEST) -> JobSpec:
    """The spec of a train job on data with this digest."""
    training = read_train_spec({**plan.spec["training"], "data_digest": data_digest})
    parts = {name: value for name, value in plan.spec.items() if name != "training"}
    return JobSpec(training=training, **{name: msgspec.convert(value, _TYPES[name]) for name, value in parts.items()})


_TYPES: Mapping[str, Any] = {
    "name": str,
    "task": JobTask,
    "base": BaseSpec,
    "data": str,
    "adapter": AdapterSpec | None,
    "dpo": DpoSpec | None,
    "publish": PublishSpec | None,
    "workers": WorkersSpec,
    "resources": ResourcesSpec,
    "evaluation_sequences": int,
    "max_failures": int,
    "timeouts": TimeoutsSpec,
}


def read_tune(plan: JobPlan) -> TuneSpec:
    """The spec of a tune job."""
    return msgspec.convert(plan.spec, TuneSpec)


def read_evaluate(plan: JobPlan) -> EvaluateSpec:
    """The spec of an evaluate job."""
    return msgspec.convert(plan.spec, EvaluateSpec)


def run_digest(job: JobSpec, base_version: str) -> str:
    """Hex sha256 over all that decides the weights a run ends with, so that equal runs are one.

    ``base_version`` identifies the bytes of the model it starts from: ``name@version``, or the digest of an
    architecture. Workers, resources and what becomes of the result are not in it.
    """
    defining = {
        "task": job.task,
        "base": base_version,
        "architecture": job.base.architecture,
        "adapter": None if job.adapter is None else _without(asdict(job.adapter), "publish"),
        "dpo": None if job.dpo is None else asdict(job.dpo),
        "training": defining_fields(job.training),
    }
    return hashlib.sha256(msgspec.json.encode(defining, order="deterministic")).hexdigest()


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def run_directory(storage: str, job: JobSpec, base_version: str) -> Path:
    """Where the run lies; PlanError before the data are prepared."""
    if job.training.data_digest == UNKNOWN_DIGEST:
        raise PlanError(f"jobs.{job.name}: data {job.data} are not prepared yet; run {job.data} first")
    return files.run_directory(files.storage_directory(storage), job.name, run_digest(job, base_version))
