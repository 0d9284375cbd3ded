"""Rules between the keys of a train job, and between it, its data and the machines: index of a job -> findings."""

from collections.abc import Iterator

from cluster.config.findings import Finding
from cluster.config.job_relations import JobRule, at_job, exactly_one, jobs_of, metric_finding, refers
from cluster.config.jobs import EvaluateJob, PrepareJob
from cluster.config.jobs_optimizers import SgdOptimizer
from cluster.config.jobs_train import (
    METRICS,
    HsdpStrategy,
    ParameterServerStrategy,
    PipelineStrategy,
    SingleStrategy,
    TrainJob,
)
from cluster.config.schema import ClusterConfig

_NO_PIPELINE = {
    "classify": "a classifier reads its answer off the whole text at once, with a head that no stage has",
    "dpo": "each step compares with a second model, which no stage has",
}


def _train(config: ClusterConfig, index: int) -> TrainJob | None:
    job = config.jobs[index]
    return job if isinstance(job, TrainJob) else None


def _data_fit_the_task(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is None:
        return
    yield from refers(config, job.data, PrepareJob, at_job(index, "data"))
    data = jobs_of(config, PrepareJob).get(job.data)
    if data is not None and data.task != job.task:
        yield Finding(
            at=at_job(index, "data"),
            message=f"is prepared for task {data.task}, and this job's is {job.task}",
            limit=f"data of task {job.task}",
            remedy=f"name another prepare job, or set task of {job.data} to {job.task}",
        )


def _one_duration(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is not None:
        yield from exactly_one(job.duration, at_job(index, "duration"), "{epochs: 3}")


def _one_base(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is None:
        return
    yield from exactly_one(job.base, at_job(index, "base"), "{source: registry://NAME@latest}")
    architecture = job.base.architecture
    if architecture is None:
        return
    at = at_job(index, "base", "architecture")
    if not isinstance(architecture.get("model_type"), str):
        message, limit = "does not say its model_type", "a model type of transformers, such as llama or bert"
        yield Finding(at=at, message=message, limit=limit, remedy="add `model_type: llama`")
    refused = {"dpo": job.task == "dpo", "an adapter": job.adapter is not None}
    for what, is_so in refused.items():
        if is_so:
            yield Finding(
                at=at,
                message=f"begins with random weights, which {what} cannot build on",
                limit="task lm, sft or classify, without an adapter",
                remedy="train it with task lm first, and use base: {source: registry://NAME@latest} here",
            )


def _dpo_settings(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is not None and job.dpo is not None and job.task != "dpo":
        message, limit = f"has no meaning for task {job.task}", "with task dpo only"
        yield Finding(at=at_job(index, "dpo"), message=message, limit=limit, remedy="remove it")


def _adapter_is_served(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is None or job.adapter is None or job.adapter.publish == "merged":
        return
    if job.task == "classify":
        yield Finding(
            at=at_job(index, "adapter", "publish"),
            message="leaves the classifier's head, which is trained too, without a model to be part of",
            value="adapter",
            limit="merged, with task classify",
            remedy="write `publish: merged`",
        )


def _worker_range(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is not None and job.workers.min > job.workers.max:
        yield Finding(
            at=at_job(index, "workers", "min"),
            message="is more than max",
            value=str(job.workers.min),
            limit=f"at most max, which is {job.workers.max}",
            remedy=f"set min to {job.workers.max} or less, or max to {job.workers.min} or more",
        )


def _batch_divides(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is not None and job.batch.sequences % job.batch.micro_sequences:
        yield Finding(
            at=at_job(index, "batch", "micro_sequences"),
            message="does not divide the batch",
            value=str(job.batch.micro_sequences),
            limit=f"a divisor of batch.sequences, which is {job.batch.sequences}",
            remedy="change one of the two",
        )


def _shares(job: TrainJob, num_workers: int) -> int | None:
    """Equal shares into which so many workers cut a batch; None when they cannot form the strategy."""
    match job.strategy:
        case SingleStrategy():
            return 1 if num_workers == 1 else None
        case HsdpStrategy(shard_workers=shard_workers):
            return None if num_workers % shard_workers else num_workers
        case PipelineStrategy(data_parallel=data_parallel):
            formed = num_workers % data_parallel == 0 and num_workers // data_parallel >= 2
            return data_parallel if formed else None
        case ParameterServerStrategy():
            return 1 if num_workers >= 2 else None
        case _:
            return num_workers


def _workers_form_the_strategy(config: ClusterConfig, index: int) -> Iterator[Finding]:
    """At every number of workers the run may come to have."""
    job = _train(config, index)
    if job is None:
        return
    wrong = [number for number in range(job.workers.min, job.workers.max + 1) if _shares(job, number) is None]
    if not wrong:
        return
    match job.strategy:
        case HsdpStrategy(shard_workers=shard_workers):
            limit, remedy = (
                f"multiples of shard_workers, {shard_workers}",
                f"set workers to {shard_workers}, or twice it",
            )
        case PipelineStrategy(data_parallel=1):
            limit, remedy = "2 or more, one for each stage", "set workers to 2, or strategy to ddp"
        case PipelineStrategy(data_parallel=many):
            limit, remedy = (
                f"2 or more for each of {many} pipelines",
                f"set workers to {2 * many}, or data_parallel to 1",
            )
        case ParameterServerStrategy():
            limit, remedy = "2 or more: one holds the weights, the others compute", "set workers to 2, or more"
        case _:
            limit, remedy = "1", "set workers to 1, or strategy to ddp"
    yield Finding(
        at=at_job(index, "workers"),
        message=f"may be {wrong[0]}, which do not form strategy {job.strategy.kind}",
        limit=limit,
        remedy=remedy,
    )


def _workers_share_the_batch(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is None or job.batch.sequences % job.batch.micro_sequences:
        return
    num_micro = job.batch.sequences // job.batch.micro_sequences
    for number in range(job.workers.min, job.workers.max + 1):
        shares = _shares(job, number)
        if shares is not None and num_micro % shares:
            exact = [str(count) for count in range(1, min(num_micro, 64) + 1) if num_micro % count == 0]
            yield Finding(
                at=at_job(index, "workers"),
                message=f"may be {shares}, and {num_micro} micro-batches (batch.sequences / micro_sequences) are not "
                "shared equally by them",
                limit=f"{', '.join(exact)}, so that the batch is the same at every number of workers",
                remedy="change workers, or batch.micro_sequences",
            )
            return


def _pipeline_is_possible(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is None or not isinstance(job.strategy, PipelineStrategy):
        return
    at, strategy = at_job(index, "strategy", "kind"), job.strategy
    if job.task in _NO_PIPELINE:
        yield Finding(
            at=at,
            message=f"is not possible with task {job.task}: {_NO_PIPELINE[job.task]}",
            limit="ddp, fsdp or hsdp",
            remedy="write fsdp, which also spreads a large model",
        )
    if (strategy.stages_per_worker == 1) != (strategy.schedule == "1f1b"):
        yield Finding(
            at=at_job(index, "strategy", "stages_per_worker"),
            message=f"does not go with schedule {strategy.schedule}",
            value=str(strategy.stages_per_worker),
            limit="1 with 1f1b, 2 or more with interleaved",
            remedy="write `stages_per_worker: 2`"
            if strategy.stages_per_worker == 1
            else "write schedule: interleaved",
        )
    yield from _pipeline_is_filled(job, strategy, index)


def _pipeline_is_filled(job: TrainJob, strategy: PipelineStrategy, index: int) -> Iterator[Finding]:
    """As many micro-batches as workers in a row at least; with interleaved, a multiple."""
    depth = job.workers.max // strategy.data_parallel
    num_micro = job.batch.sequences // job.batch.micro_sequences // strategy.data_parallel
    if num_micro < depth:
        yield Finding(
            at=at_job(index, "batch", "micro_sequences"),
            message=f"leaves {num_micro} micro-batches for {depth} workers in a row",
            value=str(job.batch.micro_sequences),
            limit=f"{depth} micro-batches or more per step and pipeline",
            remedy="lower it, or raise batch.sequences",
        )
    elif strategy.schedule == "interleaved" and num_micro % depth:
        yield Finding(
            at=at_job(index, "batch", "micro_sequences"),
            message=f"makes {num_micro} micro-batches, which {depth} workers cannot interleave",
            value=str(job.batch.micro_sequences),
            limit=f"a multiple of {depth} micro-batches per step and pipeline",
            remedy="change it, or write schedule: 1f1b",
        )


def _low_bit_is_whole(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is not None and job.optimizer.kind == "adamw8bit" and job.strategy.kind in ("fsdp", "hsdp"):
        yield Finding(
            at=at_job(index, "optimizer", "kind"),
            message=f"is not possible with strategy {job.strategy.kind}: its states are quantized in blocks, which "
            "another number of workers would cut otherwise",
            value="adamw8bit",
            limit="any other kind, or strategy single, ddp or pipeline",
            remedy="write adamw, or set strategy to ddp",
        )


def _nesterov_has_momentum(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is None or not isinstance(job.optimizer, SgdOptimizer):
        return
    if job.optimizer.nesterov and job.optimizer.momentum == 0:
        yield Finding(
            at=at_job(index, "optimizer", "nesterov"),
            message="looks ahead along a momentum of 0",
            value="true",
            limit="with a momentum above 0",
            remedy="add `momentum: 0.9`",
        )


def _schedule_is_whole(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is None:
        return
    schedule = job.schedule
    at_decay = at_job(index, "schedule", "decay_steps")
    if schedule.kind == "wsd" and schedule.decay_steps is None:
        limit = "1 or more, with kind wsd"
        yield Finding(at=at_decay, message="is missing", limit=limit, remedy="add `decay_steps: ...`")
    if schedule.kind != "wsd" and schedule.decay_steps is not None:
        message, limit = f"has no meaning for kind {schedule.kind}", "with kind wsd only"
        yield Finding(at=at_decay, message=message, limit=limit, remedy="remove it, or write kind: wsd")
    if schedule.kind == "constant" and schedule.final_fraction is not None:
        at = at_job(index, "schedule", "final_fraction")
        message, limit = "has no meaning for kind constant", "with kind linear, cosine or wsd"
        yield Finding(at=at, message=message, limit=limit, remedy="remove it, or write kind: linear")
    used = schedule.warmup_steps + (schedule.decay_steps or 0)
    if job.duration.steps is not None and used > job.duration.steps:
        yield Finding(
            at=at_job(index, "schedule", "warmup_steps"),
            message=f"and decay_steps take {used} steps together",
            value=str(schedule.warmup_steps),
            limit=f"at most duration.steps, which is {job.duration.steps}",
            remedy="lower one of them, or train longer",
        )


def _evaluation_is_possible(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is None:
        return
    if job.evaluate is None:
        yield from _nothing_needs_evaluation(job, index)
        return
    if job.evaluate.metric is not None and job.evaluate.metric not in METRICS[job.task]:
        yield metric_finding(at_job(index, "evaluate", "metric"), job.evaluate.metric, METRICS[job.task], job.task)
    data = jobs_of(config, PrepareJob).get(job.data)
    if data is not None and data.split.eval_fraction == 0:
        yield Finding(
            at=at_job(index, "evaluate"),
            message=f"has nothing to measure on: {job.data} holds nothing out",
            limit="null, while split.eval_fraction of the data is 0",
            remedy=f"set split.eval_fraction of {job.data} to 0.1, or write `evaluate: null`",
        )


def _nothing_needs_evaluation(job: TrainJob, index: int) -> Iterator[Finding]:
    remedy = "remove `evaluate: null`, or remove this"
    if job.checkpoint.keep_best:
        at = at_job(index, "checkpoint", "keep_best")
        message = "asks for the best, and nothing is evaluated"
        yield Finding(at=at, message=message, limit="0, with evaluate: null", remedy=remedy)
    if job.publish is not None and job.publish.require:
        at = at_job(index, "publish", "require")
        message = "asks for metrics, and nothing is evaluated"
        yield Finding(at=at, message=message, limit="without it, with evaluate: null", remedy=remedy)


def _requirements_are_metrics(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = _train(config, index)
    if job is None or job.publish is None:
        return
    for name in job.publish.require:
        if name not in METRICS[job.task]:
            yield metric_finding(at_job(index, "publish", "require", name), name, METRICS[job.task], job.task)


def _nodes_have_room(config: ClusterConfig, index: int) -> Iterator[Finding]:
    job = config.jobs[index]
    if not isinstance(job, TrainJob | EvaluateJob):
        return
    nodes = config.cluster.nodes
    num_workers = job.workers.min if isinstance(job, TrainJob) else 1
    for key, each, name in (("cpus", job.resources.cpus, "CPU"), ("gpus", float(job.resources.gpus), "GPU")):
        offered = [getattr(group.resources, name) for group in nodes]
        room = (
            sum(int(amount / each) * group.max for amount, group in zip(offered, nodes, strict=True))
            if each
            else None
        )
        if room is not None and room < num_workers:
            do = "does" if num_workers == 1 else "do"
            yield Finding(
                at=at_job(index, "workers") if room else at_job(index, "resources", key),
                message=f"{num_workers} {do} not fit the machines, which have room for {room} of {each:g} {name}",
                value=str(num_workers) if room else f"{each:g}",
                limit=f"{name} of {' and '.join(f'{group.max} x {group.name}' for group in nodes)}",
                remedy=f"lower it, or resources.{key}, or add nodes" if room else "lower it, or add nodes",
            )


TRAIN_RULES: tuple[JobRule, ...] = (
    _data_fit_the_task,
    _one_duration,
    _one_base,
    _dpo_settings,
    _adapter_is_served,
    _worker_range,
    _batch_divides,
    _workers_form_the_strategy,
    _workers_share_the_batch,
    _pipeline_is_possible,
    _low_bit_is_whole,
    _nesterov_has_momentum,
    _schedule_is_whole,
    _evaluation_is_possible,
    _requirements_are_metrics,
    _nodes_have_room,
)
