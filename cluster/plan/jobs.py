"""Jobs of a validated config become what runs: everything resolved, in plain values that the jobs themselves read.

``cluster`` knows no training: ``JobPlan.spec`` has the shape of a type in ``train_jobs``, which reads it.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import JsonValue, ValidationError

from cluster.config.base import StrictModel
from cluster.config.findings import dotted
from cluster.config.job_paths import with_values
from cluster.config.job_relations import jobs_of
from cluster.config.jobs import EvaluateJob, JobConfig, PrepareJob, SearchRange, TuneJob
from cluster.config.jobs_optimizers import ScheduleSection
from cluster.config.jobs_train import METRICS, DpoSection, EvaluationSection, JobResources, JobTask, TrainJob
from cluster.config.relations import check_relations
from cluster.config.schema import ClusterConfig
from cluster.errors import PlanError
from cluster.plan.types import PlanModel

JobKind = Literal["prepare", "train", "tune", "evaluate"]


class WorkerResources(PlanModel):
    """What each worker of a job reserves and uses."""

    cpus: float
    gpus: int
    threads: int
    """Threads of computation on the CPU."""


class WorkerRange(PlanModel):
    """How many workers a job has."""

    min: int
    max: int
    resize_delay_s: float
    """How long another number must be possible before a run changes to it."""


class JobPlan(PlanModel):
    """One job of the YAML."""

    name: str
    kind: JobKind
    task: JobTask
    """Of a tune job, that of the job it varies; of an evaluate job, that of its data, or lm with a harness."""
    data: str | None
    """The prepare job whose data it reads; of a prepare job, its own name. None of an evaluate job with a harness."""
    workers: WorkerRange
    resources: WorkerResources
    spec: dict[str, Any]
    """JSON values in the shape of ``train_jobs.data.spec.PrepareSpec`` or, by kind, ``train_jobs.job``'s ``JobSpec``
    (``TrainSpec`` within it lacks the digest of the data), ``TuneSpec`` or ``EvaluateSpec``."""


def plan_jobs(config: ClusterConfig) -> tuple[JobPlan, ...]:
    """The plans of all jobs, in file order."""
    return tuple(_plan(config, job) for job in config.jobs)


def plan_job(config: ClusterConfig, name: str) -> JobPlan:
    """The plan of one job; PlanError naming those that exist when there is none of that name."""
    for job in config.jobs:
        if job.name == name:
            return _plan(config, job)
    raise PlanError(f"jobs: there is no job {name!r} in {config.name}; {_those_of(config)}")


def plan_data(config: ClusterConfig, plan: JobPlan) -> JobPlan:
    """The plan of the prepare job whose data a job reads."""
    assert plan.data is not None, "only evaluate jobs may read none"
    return plan_job(config, plan.data)


def plan_trial(config: ClusterConfig, name: str, values: Mapping[str, JsonValue]) -> JobPlan:
    """The plan of train job ``name`` with some settings, by their dotted path, replaced.

    PlanError says which values cannot be, in the words of the config.
    """
    varied = jobs_of(config, TrainJob)[name]
    said = ", ".join(f"{path} {value}" for path, value in values.items())
    try:
        trial = with_values(varied, values)
    except ValidationError as error:
        wrong = "; ".join(f"{dotted(details['loc'])}: {details['msg']}" for details in error.errors())
        raise PlanError(f"jobs.{name} with {said}: {wrong}") from error
    changed = config.model_copy(update={"jobs": tuple(trial if job is varied else job for job in config.jobs)})
    findings = check_relations(changed)
    if findings:
        told = "; ".join(f"{dotted(each.at)}: {each.message}; {each.remedy}" for each in findings)
        raise PlanError(f"jobs.{name} with {said}: {told}")
    return plan_job(changed, name)


def _those_of(config: ClusterConfig) -> str:
    return f"it has {', '.join(job.name for job in config.jobs)}" if config.jobs else "it has no jobs"


def _plan(config: ClusterConfig, job: JobConfig) -> JobPlan:
    match job:
        case PrepareJob():
            return _job_plan(job, job.task, job.name, JobResources(), _prepare_spec(job), most=job.workers)
        case TrainJob():
            return _train_plan(job)
        case TuneJob():
            varied = jobs_of(config, TrainJob)[job.job]
            update = {"name": job.name, "kind": "tune", "spec": _tune_spec(job, varied)}
            return _train_plan(varied).model_copy(update=update)
        case EvaluateJob():
            task = "lm" if job.data is None else jobs_of(config, PrepareJob)[job.data].task
            return _job_plan(job, task, job.data, job.resources, _evaluate_spec(job, task), most=1)


def _job_plan(
    job: PrepareJob | EvaluateJob,
    task: JobTask,
    data: str | None,
    resources: JobResources,
    spec: dict[str, Any],
    *,
    most: int,
) -> JobPlan:
    return JobPlan(
        name=job.name,
        kind=job.kind,
        task=task,
        data=data,
        workers=WorkerRange(min=1, max=most, resize_delay_s=0),
        resources=_resources(resources),
        spec=spec,
    )


def _resources(section: JobResources) -> WorkerResources:
    return WorkerResources(cpus=section.cpus, gpus=section.gpus, threads=section.threads)


def _values(section: StrictModel, *without: str) -> dict[str, Any]:
    """The section as JSON values, of which sources are URIs; times stay numbers where they are left out."""
    return section.model_dump(mode="json", exclude=set(without))


def _prepare_spec(job: PrepareJob) -> dict[str, Any]:
    return _values(job, "kind", "workers")


def _evaluate_spec(job: EvaluateJob, task: JobTask) -> dict[str, Any]:
    return {**_values(job, "kind"), "task": task, "split": None if job.data is None else job.split or "eval"}


def _tune_spec(job: TuneJob, varied: TrainJob) -> dict[str, Any]:
    assert varied.evaluate is not None, "relations of the config refuse a sweep over a job without evaluation"
    metric = job.metric or _metric(varied)
    return {
        "name": job.name,
        "job": job.job,
        "search": job.search,
        "trials": job.trials,
        "space": {path: _range(values) for path, values in job.space.items()},
        "metric": metric,
        "mode": METRICS[varied.task][metric],
        "stop": None if job.stop is None else _values(job.stop, "kind"),
        "concurrent": job.concurrent,
        "seed": job.seed,
    }


def _range(values: SearchRange) -> dict[str, Any]:
    """``{kind, values}``: the one key that is written, and what stands behind it."""
    written = {kind: given for kind, given in _values(values).items() if given is not None}
    [(kind, given)] = written.items()
    return {"kind": kind, "values": given}


def _metric(job: TrainJob) -> str:
    named = job.evaluate.metric if job.evaluate is not None else None
    return named or next(iter(METRICS[job.task]))


def _train_plan(job: TrainJob) -> JobPlan:
    workers = job.workers
    return JobPlan(
        name=job.name,
        kind="train",
        task=job.task,
        data=job.data,
        workers=WorkerRange(min=workers.min, max=workers.max, resize_delay_s=workers.resize_delay),
        resources=_resources(job.resources),
        spec=_train_job_spec(job),
    )


def _train_job_spec(job: TrainJob) -> dict[str, Any]:
    return {
        "name": job.name,
        "task": job.task,
        "base": _values(job.base),
        "data": job.data,
        "adapter": None if job.adapter is None else _values(job.adapter),
        "dpo": _values(job.dpo or DpoSection()) if job.task == "dpo" else None,
        "publish": None if job.publish is None else _values(job.publish),
        "workers": {
            "min": job.workers.min,
            "max": job.workers.max,
            "resize_delay_s": job.workers.resize_delay,
        },
        "resources": _values(job.resources),
        "evaluation_sequences": (job.evaluate or EvaluationSection()).batch_sequences,
        "max_failures": job.max_failures,
        "timeouts": {"start_s": job.timeouts.start, "step_s": job.timeouts.step},
        "training": _training(job),
    }


def _training(job: TrainJob) -> dict[str, Any]:
    """In the shape of ``TrainSpec``, but for the digest of the data."""
    [(unit, amount)] = [(key, value) for key, value in _values(job.duration).items() if value is not None]
    every = None if job.evaluate is None else job.evaluate.every_steps
    keep_best = job.checkpoint.keep_best
    return {
        "optimizer": _values(job.optimizer),
        "schedule": _schedule(job.schedule),
        "strategy": _values(job.strategy),
        "batch": _values(job.batch),
        "duration": {"kind": unit, "amount": amount},
        "checkpoint": {
            "every_steps": job.checkpoint.every_steps,
            "keep_last": job.checkpoint.keep_last,
            "keep_best": int(every is not None) if keep_best is None else keep_best,
        },
        "evaluation": None if job.evaluate is None else _evaluation(job, every),
        **{key: getattr(job, key) for key in _TAKEN_AS_THEY_ARE},
    }


_TAKEN_AS_THEY_ARE = (
    "precision",
    "clip_norm",
    "ema",
    "activation_checkpointing",
    "compile",
    "deterministic",
    "seed",
)


def _schedule(section: ScheduleSection) -> dict[str, Any]:
    written = _values(section)
    if section.kind != "constant" and section.final_fraction is None:
        written["final_fraction"] = 0.0
    return written


def _evaluation(job: TrainJob, every: int | None) -> dict[str, Any]:
    metric = _metric(job)
    return {"every_steps": every, "metric": metric, "mode": METRICS[job.task][metric]}
