"""A train job of the plan in; everything it will work with, found and checked, out, before any worker starts."""

from dataclasses import dataclass
from pathlib import Path

from cluster.config.nodes import TRAIN_SLOT
from cluster.config.schema import ClusterConfig
from cluster.errors import PlanError
from cluster.plan.jobs import JobPlan, plan_data
from cluster.registry.progress import Progress
from cluster.registry.store import Registry
from cluster.runs.files import prepared_directory, storage_directory
from cluster.runs.prepared import TOKENIZER_FOLDER, Manifest
from cluster.units import format_bytes
from train_jobs.bases import FoundBase, find_base
from train_jobs.data.fitting import check_fits
from train_jobs.data.prepare import find_current
from train_jobs.data.spec import PrepareSpec
from train_jobs.data.tokenizer import find_tokenizer
from train_jobs.job import UNKNOWN_DIGEST, JobSpec, read_job, read_prepare, run_directory
from train_jobs.sizes import ModelSizes, WorkerMemory, worker_memory
from train_jobs.tasks.build import ModelOutline, outline_model
from train_jobs.tasks.combinations import check_combination
from train_jobs.tasks.spec import TaskSpec
from train_jobs.trainer.duration import total_steps
from train_jobs.trainer.schedules import check_schedule
from train_jobs.trainer.spec import ParameterServer

_UNKNOWN_LABELS = ("first", "second")
"""Stand for those that only the data will tell, where a classifier's model is counted before they are prepared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The data of a job: prepared, or only described."""

    spec: PrepareSpec
    manifest: Manifest | None
    directory: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A train job with all that it works with."""

    job: JobSpec
    data: Data
    base: FoundBase
    task: TaskSpec
    model: ModelOutline
    memory: WorkerMemory
    num_steps: int | None
    """None while that depends on data that are not prepared."""
    run_dir: Path | None
    """None while the data have no digest."""
    notes: tuple[str, ...]

    @property
    def tokens_per_step(self) -> int:
        """Positions of a step, padding included."""
        return self.job.training.batch.sequences * self.task.sequence_tokens


def look_at_data(config: ClusterConfig, plan: JobPlan, progress: Progress) -> Data:
    """The data that a job reads, as they are now: errors are those of ``find_current``."""
    spec = read_prepare(plan_data(config, plan))
    manifest = find_current(spec, config.storage_root, progress)
    return data_of(config, spec, manifest)


def data_of(config: ClusterConfig, spec: PrepareSpec, manifest: Manifest | None) -> Data:
    """Data with this manifest, which is None before they are prepared."""
    if manifest is None:
        return Data(spec=spec, manifest=None, directory=None)
    directory = prepared_directory(storage_directory(config.storage_root), spec.name, manifest.digest)
    return Data(spec=spec, manifest=manifest, directory=directory)


def resolve(config: ClusterConfig, plan: JobPlan, data: Data, progress: Progress) -> Resolved:
    """Find the base, count the model, and check that job, model, data and machines go together.

    PlanError and DataError say what does not; RegistryError and SourceError, what is missing.
    """
    digest = UNKNOWN_DIGEST if data.manifest is None else data.manifest.digest
    job = read_job(plan, digest)
    check_combination(job.task, job.training.strategy.kind, job.adapter)
    _check_slots(config, job)
    registry = Registry(config.storage_root)
    base = find_base(job, config.models, registry, progress)
    task = _task_spec(job, data, base, registry, progress)
    model = outline_model(task)
    num_steps = _check_data(job, data, model)
    memory = worker_memory(
        ModelSizes(
            num_parameters=model.num_parameters,
            num_trained=model.num_trained_parameters,
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
        ),
        job.training,
        _largest_need(job),
        sequence_tokens=data.spec.sequence_tokens,
        has_logits=job.task != "classify",
    )
    notes = (*_idle_workers(job), *_check_memory(config, job, memory))
    return Resolved(
        job=job,
        data=data,
        base=base,
        task=task,
        model=model,
        memory=memory,
        num_steps=num_steps,
        run_dir=None if data.manifest is None else run_directory(config.storage_root, job, base.version),
        notes=notes,
    )


def _task_spec(job: JobSpec, data: Data, base: FoundBase, registry: Registry, progress: Progress) -> TaskSpec:
    if data.manifest is None or data.directory is None:
        found = find_tokenizer(data.spec.tokenizer, registry, progress)
        tokenizer, directory, labels = found.entry, found.directory, data.spec.labels or _UNKNOWN_LABELS
    else:
        tokenizer, directory = data.manifest.tokenizer, data.directory / TOKENIZER_FOLDER
        labels = data.manifest.labels or ()
    return TaskSpec(
        task=job.task,
        base=base.spec,
        tokenizer=directory,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        sequence_tokens=data.spec.sequence_tokens,
        labels=labels if job.task == "classify" else None,
        adapter=job.adapter,
        dpo_beta=None if job.dpo is None else job.dpo.beta,
        evaluation_sequences=job.evaluation_sequences,
        export_dtype="base" if job.publish is None else job.publish.dtype,
    )


def _check_data(job: JobSpec, data: Data, model: ModelOutline) -> int | None:
    """Steps of the run, where they are known; the data and the model fit each other."""
    duration, batch, manifest = job.training.duration, job.training.batch, data.manifest
    if manifest is None and duration.kind == "epochs":
        return None
    num_items = 0
    if manifest is not None:
        check_fits(manifest, vocab_size=model.vocab_size, context_tokens=model.context_tokens)
        _check_splits(job, manifest)
        num_items = manifest.split("train").num_items
    num_steps = total_steps(duration, batch, num_sequences=num_items, sequence_tokens=data.spec.sequence_tokens)
    check_schedule(job.training.schedule, num_steps)
    return num_steps


def _check_splits(job: JobSpec, manifest: Manifest) -> None:
    train, held_out = manifest.split("train"), manifest.split("eval")
    if not train.num_sequences:
        raise PlanError(f"jobs.{job.name}.data: {manifest.name} has no sequence to train on; see its counts")
    if job.training.evaluation is not None and not held_out.num_sequences:
        raise PlanError(
            f"jobs.{job.name}.evaluate: {manifest.name} holds no sequence out, of {train.num_sequences}; raise its "
            "split.eval_fraction, or write `evaluate: null`"
        )
    if job.task != "classify":
        return
    present = [label for label, count in train.label_counts.items() if count]
    if len(present) < 2:
        found = f"only {present[0]}" if present else "none"
        raise PlanError(
            f"jobs.{job.name}.data: {found} of the labels {', '.join(manifest.labels or ())} is in the training part "
            f"of {manifest.name}; a classifier needs two or more"
        )


def _check_slots(config: ClusterConfig, job: JobSpec) -> None:
    """Training workers go where nodes grant places for them, so that they never count on what Serve holds."""
    places = sum(int(group.resources.custom.get(TRAIN_SLOT, 0)) * group.max for group in config.cluster.nodes)
    if places < job.workers.min:
        raise PlanError(
            f"jobs.{job.name}.workers: {job.workers.min} workers, and the nodes have places for {places}; write "
            f"`{TRAIN_SLOT}: {job.workers.max}` under resources of the nodes that should train"
        )


def _largest_need(job: JobSpec) -> int:
    """The number of workers at which one of them holds most: the fewest, but a server needs more with more."""
    return job.workers.max if isinstance(job.training.strategy, ParameterServer) else job.workers.min


def _idle_workers(job: JobSpec) -> tuple[str, ...]:
    """Notes workers that a bound on staleness leaves nothing to do for."""
    strategy, computing = job.training.strategy, job.workers.max - 1
    if not isinstance(strategy, ParameterServer) or strategy.max_staleness is None:
        return ()
    if computing <= strategy.max_staleness + 1:
        return ()
    return (
        f"with strategy.max_staleness {strategy.max_staleness} no more than {strategy.max_staleness + 1} of the "
        f"{computing} computing workers compute at a time; raise it to {computing - 1}, or take fewer workers",
    )


def _check_memory(config: ClusterConfig, job: JobSpec, memory: WorkerMemory) -> tuple[str, ...]:
    """Refuses what fits no node whatever the activations are; notes what is close. GPU memory is not known here."""
    sizes = [group.resources.memory for group in config.cluster.nodes]
    if job.resources.gpus or any(size is None for size in sizes):
        return ()
    largest = max(size for size in sizes if size is not None)
    if memory.certain > largest:
        raise PlanError(
            f"jobs.{job.name}: each worker needs {format_bytes(memory.certain)} for weights, gradients and optimizer "
            f"states, and the largest node has {format_bytes(largest)}; use strategy fsdp with more workers, an "
            "adapter, or a smaller optimizer"
        )
    if memory.total > largest:
        return (
            f"each worker may need {format_bytes(memory.total)}, and the largest node has {format_bytes(largest)}; "
            "activation_checkpointing, or less micro_sequences, needs less",
        )
    return ()
