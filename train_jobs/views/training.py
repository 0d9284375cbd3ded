"""Train jobs for people and programs: a resolved job, or how one ended, in; tables of 80 columns, JSON values out."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.config.jobs_train import METRICS
from cluster.runs.state import RunState
from cluster.units import format_bytes
from train_jobs.resolving import Resolved
from train_jobs.trainer.hooks import TrainResult
from train_jobs.views.tables import NAME_COLUMNS, pairs


def train_view(resolved: Resolved) -> RenderableType:
    """A train job, resolved: what would run, how large it is, and how long it would take."""
    job, spec = resolved.job, resolved.job.training
    heading = Text.assemble((f"Job {job.name}", "bold"), f"  train, task {job.task}")
    if resolved.run_dir is not None:
        heading.append(f"  run {resolved.run_dir.name}")
    parts: list[RenderableType] = [heading, Text(""), pairs([*_model_facts(resolved), *_step_facts(resolved)])]
    parts += [Text(""), Text("Memory of each worker", style="bold"), _memory_table(resolved)]
    if spec.strategy.kind == "fsdp" and job.workers.min != job.workers.max:
        parts.append(Text(f"That is with {job.workers.min} workers; with more, each needs less."))
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


_MEMORY_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "average": "averaged weights",
    "gathered": "gathered layers",
    "messages": "weights and gradients under way",
    "activations": "activations, about",
    "checkpoint": "copy being saved",
    "process": "the process itself",
}


def _memory_table(resolved: Resolved) -> Table:
    memory = resolved.memory
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=NAME_COLUMNS, style="dim", no_wrap=True)
    table.add_column(justify="right")
    for name, words in _MEMORY_NAMES.items():
        if getattr(memory, name):
            table.add_row(words, format_bytes(getattr(memory, name)))
    table.add_row("in all, about", Text(format_bytes(memory.total), style="bold"))
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


def trained_view(
    resolved: Resolved, result: TrainResult, state: RunState, metrics: Mapping[str, Any]
) -> RenderableType:
    """Where the run is, what it measured, and what came of it."""
    heading = Text.assemble((f"Job {state.job}", "bold"), f"  {state.status} after step {state.step}")
    facts = [("run", str(resolved.run_dir))]
    if result.resumed_from is not None:
        facts.append(("resumed from", f"step {result.resumed_from}"))
    if result.loss is not None:
        facts.append(("training loss", f"{result.loss:.6g}"))
    facts += [(name.replace("_", " "), f"{value:.6g}") for name, value in _numbers(metrics).items()]
    facts.append(("published", state.published or _nothing(resolved, result)))
    notes = [Text(f"Note: {note}.") for note in (*result.damaged, *state.notes)]
    return Group(heading, Text(""), pairs(facts), *notes)


def _nothing(resolved: Resolved, result: TrainResult) -> str:
    if resolved.job.publish is None:
        return "nothing; the job names no model to publish"
    return "nothing yet; submit the job again to continue it" if result.outcome == "stopped" else "nothing"


def trained_values(
    resolved: Resolved, result: TrainResult, state: RunState, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "job": state.job,
        "run_directory": str(resolved.run_dir),
        "status": state.status,
        "step": state.step,
        "num_steps": state.num_steps,
        "resumed_from": result.resumed_from,
        "training_loss": result.loss,
        "metrics": _numbers(metrics),
        "published": state.published,
        "notes": list(state.notes),
    }


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
