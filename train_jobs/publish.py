"""What becomes of a finished run: a checkpoint in; its evaluation, and a registry version whose alias moved, out.

Or nothing: when a requirement is missed, or anything fails, the registry is as it was. Both happen in a task of Ray's
after training, on a node that can train, since the driver's may hold no model.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import ray

from cluster.config.models import Task as ModelTask
from cluster.durable import write_json_durably
from cluster.registry.manifest import Lineage, ModelVersion, VersionSpec
from cluster.registry.sources.importer import SAFETENSORS_DTYPES
from cluster.registry.sources.screen import read_header_file, screen
from cluster.registry.store import Registry
from cluster.runs.files import EVALUATION
from cluster.runs.record import Evaluation
from cluster.runs.state import RunState, read_state, write_state
from train_jobs.evaluation.requirements import missed
from train_jobs.run_spec import RunSpec
from train_jobs.supervision.measuring import measure, set_up_process
from train_jobs.trainer.committed import read_evaluation, read_meta
from train_jobs.trainer.hooks import TrainResult
from train_jobs.trainer.materials import Materials, gather
from train_jobs.trainer.state import trained_weights

_EXPORT = "export"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishPlan:
    """Where a run goes, if it is good enough."""

    storage: str
    model: str
    """Name in the registry."""
    alias: str
    require: Mapping[str, float]
    modes: Mapping[str, Literal["min", "max"]]
    """Of every metric: whether less or more is better."""
    task: ModelTask
    adapter_of: str | None
    """The version, ``model@vN``, that is adapted; None for a whole model."""
    lineage: Lineage


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What came out of a run."""

    step: int
    """Of the checkpoint that was taken."""
    metrics: Mapping[str, Any]
    version: str | None
    """``model@vN``."""
    missed: tuple[str, ...]
    """Why there is none."""


def publish_run(spec: RunSpec, plan: PublishPlan, result: TrainResult) -> Published:
    """Evaluate and publish the best checkpoint of a finished run, or its last; notes both in the run directory.

    Raises what the evaluation, the export or the registry raise; nothing is published then.
    """
    checkpoint = result.best_checkpoint or result.checkpoint
    task = ray.remote(evaluate_and_publish).options(num_cpus=spec.needs.cpus, num_gpus=spec.needs.gpus, max_retries=0)
    try:
        done: Published = ray.get(task.remote(spec, plan, checkpoint))
    except Exception as error:
        _note(spec, None, (f"not published: {error}",))
        raise
    write_json_durably(spec.run_dir / EVALUATION, Evaluation(step=done.step, metrics=dict(done.metrics)))
    _note(spec, done.version, tuple(f"not published: {sentence}" for sentence in done.missed))
    return done


def evaluate_and_publish(spec: RunSpec, plan: PublishPlan, checkpoint: Path) -> Published:
    """The work itself, in this process."""
    set_up_process(spec)
    materials = gather(spec.materials, spec.arguments)
    step, metrics = read_meta(checkpoint).step, evaluate(spec, materials, checkpoint)
    sentences = missed(plan.require, plan.modes, metrics)
    if sentences:
        return Published(step=step, metrics=metrics, version=None, missed=sentences)
    folder = spec.run_dir / _EXPORT
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        materials.task.export(trained_weights(checkpoint, averaged=spec.train.ema is not None), folder)
        version = _publish(plan, folder, metrics)
    finally:
        shutil.rmtree(folder)
    return Published(step=step, metrics=metrics, version=version.reference, missed=())


def evaluate(spec: RunSpec, materials: Materials, checkpoint: Path) -> dict[str, Any]:
    """Metrics of a checkpoint: those measured along the way, or else measured now; empty without data."""
    known = read_evaluation(checkpoint)
    if known is not None:
        return known.metrics
    return {} if materials.evaluation_data is None else measure(spec, materials, checkpoint)


def _publish(plan: PublishPlan, folder: Path, metrics: Mapping[str, Any]) -> ModelVersion:
    registry = Registry(plan.storage)
    described = _describe(registry, plan, folder)
    spec = VersionSpec(
        task=plan.task,
        chat_template=(folder / "chat_template.jinja").is_file(),
        adapter_of=plan.adapter_of,
        metrics={name: float(value) for name, value in metrics.items() if isinstance(value, int | float)},
        lineage=plan.lineage,
        **described,
    )
    version = registry.publish(plan.model, folder, spec)
    registry.set_alias(plan.model, plan.alias, version.version, reason=f"job {plan.lineage.job}")
    return version


def _describe(registry: Registry, plan: PublishPlan, folder: Path) -> dict[str, Any]:
    """Architecture, model type and dtype of an exported directory; an adapter's are those of its base."""
    if plan.adapter_of is not None:
        base = registry.resolve(plan.adapter_of)
        found = {str(tensor["dtype"]) for tensor in read_header_file(folder / _ADAPTER_WEIGHTS).values()}
        return {"architecture": base.architecture, "model_type": base.model_type, "dtype": _dtype(found)}
    screened = screen(folder)
    return {
        "architecture": screened.config["architectures"][0],
        "model_type": screened.config["model_type"],
        "dtype": _dtype(screened.dtypes),
    }


def _dtype(found: set[str] | frozenset[str]) -> str:
    (only,) = found
    return next(name for name, spelled in SAFETENSORS_DTYPES.items() if spelled == only)


def _note(spec: RunSpec, version: str | None, notes: tuple[str, ...]) -> None:
    state: RunState = read_state(spec.run_dir)
    write_state(spec.run_dir, msgspec.structs.replace(state, published=version, notes=notes))
