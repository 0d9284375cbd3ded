"""Prepared data and resolved jobs for people: what is known in, tables of 80 columns out."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgspec
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.config.jobs_train import METRICS
from cluster.plan.jobs import JobPlan
from cluster.units import format_bytes
from train_jobs.data.manifest import Manifest, SplitEntry
from train_jobs.data.spec import PrepareSpec
from train_jobs.resolving import Resolved

NAME_COLUMNS = 16
"""Width of the names before values."""


def data_view(manifest: Manifest) -> RenderableType:
    """What a prepare job made: counts, labels, sources, notes."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("split")
    for name in ("documents", "sequences", "tokens", "targets", "full", "cut"):
        table.add_column(name, justify="right")
    for name, split in manifest.splits.items():
        table.add_row(name, *_split_row(split))
    parts: list[RenderableType] = [
        Text.assemble((f"Data {manifest.name}", "bold"), f"  task {manifest.task}  digest {manifest.digest[:12]}"),
        table,
        pairs(_facts(manifest)),
    ]
    if manifest.labels is not None:
        parts += [Text(""), _label_table(manifest)]
    parts += [Text(f"Note: {note}") for note in manifest.notes]
    parts += [Text(f"Left out: {row.place}: {row.reason}") for row in manifest.bad_rows_sample]
    return Group(*parts)


def _split_row(split: SplitEntry) -> Sequence[str]:
    counts = (split.num_documents, split.num_sequences, split.num_tokens, split.num_targets)
    return (*(f"{count:,}" for count in counts), f"{split.fill_ratio:.1%}", f"{split.num_truncated:,}")


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    left_out = {
        "malformed": manifest.num_bad_rows,
        "duplicates": manifest.num_duplicates,
        "too short": manifest.num_too_short,
        "without targets": manifest.num_without_targets,
    }
    said = ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count)
    facts = [
        ("sequences of", f"{manifest.sequence_tokens} tokens"),
        ("rows read", f"{manifest.num_rows:,}" + (f", left out: {said}" if said else "")),
        ("tokenizer", f"{manifest.tokenizer.source}, {manifest.tokenizer.vocab_size:,} tokens"),
    ]
    facts += [("source", f"{source.source}, {source.num_files:,} files") for source in manifest.sources]
    return facts


def _label_table(manifest: Manifest) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("label")
    for name in manifest.splits:
        table.add_column(name, justify="right")
    for label in manifest.labels or ():
        counts = (split.label_counts.get(label, 0) for split in manifest.splits.values())
        table.add_row(label, *(f"{count:,}" for count in counts))
    return table


def pairs(facts: Sequence[tuple[str, str]]) -> Table:
    """Names and values in two columns; long values go on below themselves."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=NAME_COLUMNS, style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(value))
    return table


def prepare_view(plan: JobPlan, spec: PrepareSpec) -> RenderableType:
    """A prepare job that has not run."""
    how = "in the job's process" if plan.workers.max == 1 else f"by up to {plan.workers.max} actors of Ray Data"
    facts = [
        ("sequences of", f"{spec.sequence_tokens} tokens"),
        ("tokenizer", spec.tokenizer),
        ("held out", f"{spec.split.eval_fraction:.1%} of the documents, seed {spec.split.seed}"),
        ("bad rows", f"up to {spec.max_bad_rows} tolerated"),
        ("runs", how),
    ]
    facts += [("source", f"{each.source}, {each.format}, weight {each.weight:g}") for each in spec.inputs]
    heading = Text.assemble((f"Data {spec.name}", "bold"), f"  task {spec.task}  not prepared yet")
    return Group(heading, Text(""), pairs(facts))


def train_view(resolved: Resolved) -> RenderableType:
    """A train job, resolved: what would run, how large it is, and how long it would take."""
    job, spec = resolved.job, resolved.job.training
    heading = Text.assemble((f"Job {job.name}", "bold"), f"  train, task {job.task}")
    if resolved.run_dir is not None:
        heading.append(f"  run {resolved.run_dir.name}")
    parts: list[RenderableType] = [heading, Text(""), pairs([*_model_facts(resolved), *_step_facts(resolved)])]
    parts += [Text(""), Text("Memory of each worker", style="bold"), _memory_table(resolved)]
    if spec.strategy.kind != "single" and job.workers.min != job.workers.max:
        parts.append(Text(f"With {job.workers.min} workers; with more, fsdp and hsdp need less each."))
    parts += [Text(f"Note: {note}.") for note in resolved.notes]
    return Group(*parts)


def _model_facts(resolved: Resolved) -> list[tuple[str, str]]:
    job, model = resolved.job, resolved.model
    registered = resolved.base.registered
    base = f"{model.model_type} from scratch" if registered is None else f"{registered.reference}, {model.model_type}"
    share = model.num_trained_parameters / model.num_parameters
    trained = "all trained" if share == 1 else f"{model.num_trained_parameters:,} trained, {share:.2%}"
    adapter = job.adapter
    facts = [
        ("base", f"{base}, {model.num_layers} layers of width {model.hidden_size}"),
        ("parameters", f"{model.num_parameters:,}, {trained}"),
    ]
    if adapter is not None:
        targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
        said = (
            f"{adapter.kind}, rank {adapter.rank}, alpha {adapter.alpha:g}, on {targets}; published {adapter.publish}"
        )
        facts.append(("adapter", said))
    return facts


def _step_facts(resolved: Resolved) -> list[tuple[str, str]]:
    job, spec, data = resolved.job, resolved.job.training, resolved.data
    sequences = "" if data.manifest is None else f", {data.manifest.split('train').num_items:,} sequences"
    digest = "not prepared yet" if data.manifest is None else f"digest {data.manifest.digest[:12]}"
    workers = (
        f"{job.workers.min}" if job.workers.min == job.workers.max else f"{job.workers.min} to {job.workers.max}"
    )
    each = f"{job.resources.cpus:g} CPU" + (f", {job.resources.gpus} GPU" if job.resources.gpus else "")
    return [
        ("data", f"{data.spec.name}{sequences} of {data.spec.sequence_tokens} tokens, {digest}"),
        ("steps", _steps(resolved)),
        ("batch", f"{spec.batch.sequences} sequences, {spec.batch.micro_sequences} at a time"),
        ("optimizer", f"{spec.optimizer.kind}, lr {spec.optimizer.lr:g}, {_schedule(resolved)}"),
        ("precision", f"{spec.precision}{', deterministic' if spec.deterministic else ''}, seed {spec.seed}"),
        ("workers", f"{workers}, strategy {spec.strategy.kind}, {each} each"),
        ("checkpoints", _checkpoints(resolved)),
        ("publishes", _publishes(resolved)),
    ]


def _steps(resolved: Resolved) -> str:
    duration = resolved.job.training.duration
    if resolved.num_steps is None:
        return f"{duration.amount} {duration.kind}; how many steps, the data will tell"
    tokens = resolved.num_steps * resolved.tokens_per_step
    return f"{resolved.num_steps:,} of {resolved.tokens_per_step:,} tokens, {tokens:,} in all"


def _schedule(resolved: Resolved) -> str:
    schedule = resolved.job.training.schedule
    decay = f", {schedule.decay_steps} of decay" if schedule.decay_steps else ""
    return f"{schedule.kind} after {schedule.warmup_steps} steps of warm-up{decay}"


def _checkpoints(resolved: Resolved) -> str:
    checkpoint, evaluation = resolved.job.training.checkpoint, resolved.job.training.evaluation
    said = f"every {checkpoint.every_steps} steps, the last {checkpoint.keep_last} kept"
    if checkpoint.keep_best:
        said += f", and the best {checkpoint.keep_best}"
    if evaluation is None:
        return f"{said}; never evaluated"
    when = "after the last step" if evaluation.every_steps is None else f"every {evaluation.every_steps} steps"
    return f"{said}; evaluated {when} by {evaluation.metric}"


def _publishes(resolved: Resolved) -> str:
    publish = resolved.job.publish
    if publish is None:
        return "nothing"
    modes = METRICS[resolved.job.task]
    required = [
        f"{name} {'>=' if modes[name] == 'max' else '<='} {limit:g}" for name, limit in publish.require.items()
    ]
    return f"{publish.model}@{publish.alias}" + (f" if {' and '.join(required)}" if required else "")


def _memory_table(resolved: Resolved) -> Table:
    memory = resolved.memory
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    names = ("weights", "gradients", "optimizer", "average", "gathered", "activations", "checkpoint", "process")
    shown = [name for name in names if getattr(memory, name)]
    for name in (*shown, "in all"):
        table.add_column(name, justify="right")
    table.add_row(*(format_bytes(getattr(memory, name)) for name in shown), f"~{format_bytes(memory.total)}")
    return table


def train_values(resolved: Resolved) -> dict[str, Any]:
    """The same as JSON values."""
    manifest = resolved.data.manifest
    return {
        "job": resolved.job.name,
        "run_directory": None if resolved.run_dir is None else str(resolved.run_dir),
        "base": resolved.base.version,
        "data_digest": None if manifest is None else manifest.digest,
        "num_parameters": resolved.model.num_parameters,
        "num_trained_parameters": resolved.model.num_trained_parameters,
        "num_steps": resolved.num_steps,
        "tokens_per_step": resolved.tokens_per_step,
        "worker_memory": {**asdict(resolved.memory), "total": resolved.memory.total},
        "notes": list(resolved.notes),
        "spec": msgspec.to_builtins(resolved.job),
    }
