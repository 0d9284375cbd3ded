"""Rules between the keys of one job, between jobs, and between jobs and the machines: a config and an index in,
findings out.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from cluster.config.base import StrictModel
from cluster.config.findings import Finding, Location
from cluster.config.job_paths import path_problem
from cluster.config.jobs import TASK_FORMATS, EvaluateJob, PrepareJob, SearchRange, TuneJob
from cluster.config.jobs_train import METRICS, TrainJob
from cluster.config.schema import ClusterConfig
from cluster.config.sections import closest_of
from cluster.config.wording import either

Job = TypeVar("Job", bound=StrictModel)
FIXED = ("name", "kind", "task", "data", "publish")
"""Keys of a train job that a sweep cannot vary."""

JobRule = Callable[[ClusterConfig, int], Iterator[Finding]]


def at_job(index: int, *keys: str | int) -> Location:
    """The place of a key of a job."""
    return ("jobs", index, *keys)


def jobs_of(config: ClusterConfig, section: type[Job]) -> dict[str, Job]:
    """Jobs of one kind by their names."""
    return {job.name: job for job in config.jobs if isinstance(job, section)}


def exactly_one(section: StrictModel, at: Location, example: str) -> Iterator[Finding]:
    """A finding unless exactly one of the section's keys has a value."""
    given = [name for name in type(section).model_fields if getattr(section, name) is not None]
    choices = either(list(type(section).model_fields))
    if len(given) > 1:
        message = f"has {' and '.join(given)}, which exclude each other"
        yield Finding(at=at, message=message, limit=f"one of {choices}", remedy=f"keep one, such as {example}")
    elif not given:
        yield Finding(at=at, message="has none of its keys", limit=f"one of {choices}", remedy=f"write {example}")


def refers(config: ClusterConfig, name: str, section: type[StrictModel], at: Location) -> Iterator[Finding]:
    """A finding unless there is a job ``name`` of the kind that ``section`` is."""
    kind = str(section.model_fields["kind"].annotation.__args__[0])  # type: ignore[union-attr]
    wanted = [job.name for job in config.jobs if isinstance(job, section)]
    if name in wanted or not all(isinstance(job, StrictModel) for job in config.jobs):
        return  # a job whose kind was wrong may be the one that is meant
    others = {job.name: job.kind for job in config.jobs}
    what = f"is the name of a job of kind {others[name]}" if name in others else "is not the name of a job"
    closest = closest_of(name, wanted)
    remedy = f"did you mean {closest}?" if closest else f"add a job with `kind: {kind}` and this name"
    limit = f"jobs of kind {kind}: {', '.join(wanted)}" if wanted else f"a job of kind {kind}; there is none"
    yield Finding(at=at, message=what, value=name, limit=limit, remedy=remedy)


def _storage_is_a_path(config: ClusterConfig, index: int) -> Iterator[Finding]:
    if index == 0 and "://" in config.storage and not config.storage.startswith("file://"):
        yield Finding(
            at=("storage",),
            message="is not a file system, which jobs need: prepared data is mapped into memory",
            limit="an absolute path, on a file system that all nodes share, where there are jobs",
            remedy="write such a path, or move the jobs to a config of their own",
        )


def _formats_hold_the_task(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = config.jobs[index]
    if not isinstance(job, PrepareJob):
        return
    for number, source in enumerate(job.inputs):
        if source.format not in TASK_FORMATS[job.task]:
            yield Finding(
                at=at_job(index, "inputs", number, "format"),
                message=f"cannot hold what a row of task {job.task} needs",
                value=source.format,
                limit=either(list(TASK_FORMATS[job.task])),
                remedy=f"convert the files, jsonl is the simplest; or change task, which is {job.task}",
            )


def _encodings_exist(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = config.jobs[index]
    if not isinstance(job, PrepareJob):
        return
    for number, source in enumerate(job.inputs):
        try:
            "".encode(source.encoding)
        except LookupError:
            at = at_job(index, "inputs", number, "encoding")
            limit = "names that Python knows, such as utf-8 or latin-1"
            yield Finding(at=at, message="is not a known encoding", limit=limit, remedy="write utf-8, or another")


def _labels_are_for_classify(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = config.jobs[index]
    if not isinstance(job, PrepareJob) or job.labels is None:
        return
    at = at_job(index, "labels")
    if job.task != "classify":
        message, limit = f"has no meaning for task {job.task}", "with task classify only"
        yield Finding(at=at, message=message, limit=limit, remedy="remove it")
    repeated = sorted({label for label in job.labels if job.labels.count(label) > 1})
    if repeated:
        yield Finding(at=at, message=f"has {repeated[0]} twice", limit="each label once", remedy="remove one of them")


def _evaluates_one_thing(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = config.jobs[index]
    if not isinstance(job, EvaluateJob):
        return
    limit = "one of data and harness"
    if job.data is None and job.harness is None:
        remedy = "add `data:` with the name of a prepare job, or `harness: {tasks: [arc_easy]}`"
        yield Finding(at=at_job(index), message="has nothing to measure the model on", limit=limit, remedy=remedy)
    if job.data is not None and job.harness is not None:
        message, remedy = "excludes data, and both are there", "remove one of them, or make it two jobs"
        yield Finding(at=at_job(index, "harness"), message=message, limit=limit, remedy=remedy)
    if job.split is not None and job.harness is not None and job.data is None:
        message, remedy = "has no meaning for lm-eval's tasks", "remove it; a task's own YAML says what it reads"
        yield Finding(at=at_job(index, "split"), message=message, limit="with data only", remedy=remedy)


def _harness_tasks_differ(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = config.jobs[index]
    if not isinstance(job, EvaluateJob) or job.harness is None:
        return
    repeated = sorted({task for task in job.harness.tasks if job.harness.tasks.count(task) > 1})
    if repeated:
        at, message = at_job(index, "harness", "tasks"), f"has {repeated[0]} twice"
        yield Finding(at=at, message=message, limit="each task once", remedy="remove one of them")


def _evaluated_data_exist(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = config.jobs[index]
    if not isinstance(job, EvaluateJob) or job.data is None:
        return
    yield from refers(config, job.data, PrepareJob, at_job(index, "data"))
    data = jobs_of(config, PrepareJob).get(job.data)
    if data is not None and job.split != "train" and data.split.eval_fraction == 0:
        yield Finding(
            at=at_job(index, "split"),
            message=f"asks for held-out data, of which {job.data} has none",
            value="eval",
            limit="train, while its split.eval_fraction is 0",
            remedy=f"set split.eval_fraction of {job.data} to 0.1, or write `split: train`",
        )


def _tuned_job_exists(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = config.jobs[index]
    if isinstance(job, TuneJob):
        yield from refers(config, job.job, TrainJob, at_job(index, "job"))


def _space_is_of_the_job(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = config.jobs[index]
    if not isinstance(job, TuneJob):
        return
    varied = jobs_of(config, TrainJob).get(job.job)
    for path, values in job.space.items():
        at = at_job(index, "space", path)
        problem = None if varied is None else path_problem(varied, path, fixed=FIXED)
        if problem is not None:
            message, limit, remedy = problem
            yield Finding(at=at, message=message, value=path, limit=limit, remedy=remedy)
        yield from exactly_one(values, at, "{log_uniform: [1.0e-5, 1.0e-3]}")
        yield from _range_rises(values, at)
        if job.search == "grid" and values.choice is None:
            remedy = "write choice: [...], or search: random"
            yield Finding(at=at, message="has no values to try one by one", limit="choice, with grid", remedy=remedy)


def _range_rises(values: SearchRange, at: Location) -> Iterator[Finding]:
    for key in ("uniform", "log_uniform", "integer"):
        bounds: tuple[float, float] | None = getattr(values, key)
        if bounds is None:
            continue
        if bounds[0] >= bounds[1]:
            yield Finding(
                at=(*at, key), message="does not rise", limit="the smaller number first", remedy="swap the two"
            )
        if key == "log_uniform" and bounds[0] <= 0:
            message, limit = "begins at 0 or below, which has no order of magnitude", "numbers above 0"
            yield Finding(at=(*at, key), message=message, limit=limit, remedy="write a small number such as 1.0e-6")


def _tune_can_compare(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = config.jobs[index]
    varied = jobs_of(config, TrainJob).get(job.job) if isinstance(job, TuneJob) else None
    if not isinstance(job, TuneJob) or varied is None:
        return
    if varied.evaluate is None:
        message = f"needs a metric to compare, and {job.job} is never evaluated"
        remedy = f"remove `evaluate: null` of {job.job}"
        yield Finding(at=at_job(index, "job"), message=message, limit="jobs with evaluate", remedy=remedy)
    elif job.metric is not None and job.metric not in METRICS[varied.task]:
        yield metric_finding(at_job(index, "metric"), job.metric, METRICS[varied.task], varied.task)
    if job.stop is not None and varied.evaluate is not None:
        every = varied.evaluate.every_steps
        if every is None or job.stop.grace_steps % every:
            yield Finding(
                at=at_job(index, "stop", "grace_steps"),
                message="is not a step after which trials are evaluated",
                value=str(job.stop.grace_steps),
                limit=f"a multiple of evaluate.every_steps of {job.job}, which is {every or 'not set'}",
                remedy=f"set it to {every}" if every else f"set evaluate.every_steps of {job.job}",
            )


def _trials_are_given(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = config.jobs[index]
    if not isinstance(job, TuneJob):
        return
    at = at_job(index, "trials")
    if job.search == "grid" and job.trials is not None:
        message, limit = "is a second word on how many there are", "without it, with search grid"
        yield Finding(at=at, message=message, limit=limit, remedy="remove it; grid tries every combination")
    if job.search != "grid" and job.trials is None:
        message, limit = "is missing", f"a number, with search {job.search}"
        yield Finding(at=at, message=message, limit=limit, remedy="add `trials: 8`")


def metric_finding(at: Location, name: str, known: Mapping[str, object], task: str) -> Finding:
    """Of a metric that is not measured."""
    closest = closest_of(name, list(known))
    remedy = f"did you mean {closest}?" if closest else f"write {either(list(known))}"
    return Finding(
        at=at, message=f"is not measured for task {task}", value=name, limit=either(list(known)), remedy=remedy
    )


JOB_RULES: tuple[JobRule, ...] = (
    _storage_is_a_path,
    _formats_hold_the_task,
    _encodings_exist,
    _labels_are_for_classify,
    _evaluates_one_thing,
    _harness_tasks_differ,
    _evaluated_data_exist,
    _tuned_job_exists,
    _space_is_of_the_job,
    _tune_can_compare,
    _trials_are_given,
)
