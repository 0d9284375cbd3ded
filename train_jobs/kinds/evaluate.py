"""An evaluate job of the plan in, the metrics of a registry version on prepared data out, kept in a run directory."""

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import ray
import torch
from torch import nn

from cluster.config.schema import ClusterConfig
from cluster.control.report import Report
from cluster.durable import write_json_durably
from cluster.errors import MantaError, PlanError
from cluster.plan.jobs import JobPlan, plan_job
from cluster.plan.types import Task as ServedTask
from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from cluster.runs.files import EVALUATION, SPEC, prepared_directory, run_directory, storage_directory
from cluster.runs.prepared import TOKENIZER_FOLDER, Manifest
from cluster.runs.record import Evaluation
from cluster.runs.state import RunState, write_state
from train_jobs.bases import find_version
from train_jobs.data.fitting import check_fits
from train_jobs.data.shards import Shards
from train_jobs.job import EvaluateSpec, read_evaluate
from train_jobs.kinds.prepare import connect, run_prepare
from train_jobs.tasks.build import build_task, outline_model
from train_jobs.tasks.classify import Classifier
from train_jobs.tasks.language import LanguageModel, check_language_model
from train_jobs.tasks.networks import label_names, make_network, stored_config
from train_jobs.tasks.spec import Checkpoint, TaskSpec
from train_jobs.trainer.strategies.strategy import evaluating
from train_jobs.views.metrics import metrics_view
from train_jobs.views.shown import Shown
from train_jobs.views.tables import pairs

_SERVED_AS: dict[str, ServedTask] = {"lm": "generate", "sft": "generate", "classify": "classify"}
"""As what a model from outside the registry is imported."""
_ADDRESS = "RAY_ADDRESS"
"""Where a submitted job finds its cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What is measured on what; pickles."""

    task: TaskSpec
    data: Path
    split: str
    threads: int
    gpu: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What an evaluate job works with."""

    spec: EvaluateSpec
    model: str
    """``name@version``."""
    manifest: Manifest
    measurement: Measurement


def run(config: ClusterConfig, plan: JobPlan, report: Report) -> Shown:
    """Measure the job's model on its data, which are prepared first where they are not.

    PlanError, DataError and EvaluationError say why the two do not go together.
    """
    found = _find(config, plan, report)
    report.say(f"Evaluating {found.model} on {_data_words(found)}.")
    kept = _Run(config, plan, found)
    try:
        metrics = _somewhere(found.spec, found.measurement)
    except Exception as error:
        kept.failed(str(error))
        raise
    directory = kept.done(metrics)
    values = {"job": plan.name, "model": found.model, "run_directory": str(directory), "metrics": metrics}
    return Shown(view=metrics_view(f"{found.model} on {_data_words(found)}", metrics), values=values)


def look(config: ClusterConfig, plan: JobPlan, report: Report) -> Shown:
    """What would be measured; the model and the data's sources are downloaded, and the data prepared, to know."""
    found = _find(config, plan, report)
    split = found.manifest.split(found.measurement.split)
    facts = {
        "model": found.model,
        "data": _data_words(found),
        "documents": f"{split.num_documents:,}",
        "sequences": f"{split.num_sequences:,} of {found.manifest.sequence_tokens} tokens",
        "at a time": f"{found.spec.batch_sequences} sequences",
    }
    return Shown(view=pairs(list(facts.items())), values={"job": plan.name, **facts})


def _find(config: ClusterConfig, plan: JobPlan, report: Report) -> Found:
    spec = read_evaluate(plan)
    if spec.task == "dpo":
        raise PlanError(
            f"jobs.{spec.name}: dpo compares a model with the one it was trained from, which a version alone does "
            "not have; the evaluation of its training run has the numbers"
        )
    registry = Registry(config.storage_root)
    version = find_version(spec.model, spec.name, _SERVED_AS[spec.task], config.models, registry, report.progress)
    manifest = run_prepare(plan_job(config, spec.data), config.storage_root, report.progress)
    directory = prepared_directory(storage_directory(config.storage_root), spec.data, manifest.digest)
    checkpoint = Checkpoint(
        directory=materialize(registry, version, progress=report.progress), name=f"registry://{version.reference}"
    )
    measurement = Measurement(
        task=_task_spec(spec, checkpoint, manifest, directory),
        data=directory,
        split=spec.split,
        threads=spec.resources.threads,
        gpu=spec.resources.gpus > 0,
    )
    _check(measurement, manifest)
    return Found(spec=spec, model=version.reference, manifest=manifest, measurement=measurement)


def _data_words(found: Found) -> str:
    return f"split {found.measurement.split} of {found.spec.data}"


def measure(measurement: Measurement) -> dict[str, Any]:
    """The metrics, computed in this process."""
    torch.set_num_threads(measurement.threads)
    shards = Shards.open(measurement.data, measurement.split)
    task, model = build_task(measurement.task), _model(measurement.task)
    model.to(torch.device("cuda" if measurement.gpu else "cpu"))
    with evaluating(model):
        return dict(task.evaluate(model, shards))


def _somewhere(spec: EvaluateSpec, measurement: Measurement) -> dict[str, Any]:
    """In a Ray task with the job's resources; in this process when it is not on a cluster, and asks for no GPU."""
    if not (measurement.gpu or ray.is_initialized() or _ADDRESS in os.environ):
        return measure(measurement)
    connect(f"jobs.{spec.name}.resources.gpus: {spec.resources.gpus}")
    task = ray.remote(measure).options(num_cpus=spec.resources.cpus, num_gpus=spec.resources.gpus, max_retries=1)
    try:
        metrics: dict[str, Any] = ray.get(task.remote(measurement))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, MantaError) else error) from error
    return metrics


def _model(spec: TaskSpec) -> nn.Module:
    network = make_network(spec, seed=0).module
    if spec.task == "classify":
        return Classifier(network)
    model = LanguageModel(network)
    check_language_model(model)
    return model


def _task_spec(spec: EvaluateSpec, base: Checkpoint, manifest: Manifest, directory: Path) -> TaskSpec:
    """A task over the model as it is: its own labels, not the data's."""
    tokenizer = manifest.tokenizer
    return TaskSpec(
        task=spec.task,
        base=base,
        tokenizer=directory / TOKENIZER_FOLDER,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        sequence_tokens=manifest.sequence_tokens,
        labels=label_names(stored_config(base)) if spec.task == "classify" else None,
        adapter=None,
        dpo_beta=None,
        evaluation_sequences=spec.batch_sequences,
        export_dtype="base",
    )


def _check(measurement: Measurement, manifest: Manifest) -> None:
    outline = outline_model(measurement.task)
    check_fits(manifest, vocab_size=outline.vocab_size, context_tokens=outline.context_tokens)
    if not manifest.split(measurement.split).num_sequences:
        raise PlanError(
            f"data {manifest.name}: split {measurement.split} has no sequence to evaluate on; raise its "
            "split.eval_fraction, or write `split: train`"
        )


class _Run:
    """The run directory of an evaluation; evaluating the same version on the same data again replaces it."""

    def __init__(self, config: ClusterConfig, plan: JobPlan, found: Found) -> None:
        defining = {"model": found.model, "data": found.manifest.digest, "split": found.measurement.split}
        digest = hashlib.sha256(msgspec.json.encode(defining, order="deterministic")).hexdigest()
        storage = storage_directory(config.storage_root)
        self._directory = run_directory(storage, plan.name, digest)
        self._directory.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._state = RunState(
            run_id=self._directory.name,
            job=plan.name,
            kind="evaluate",
            status="running",
            began=now,
            changed=now,
            data_directory=found.measurement.data.relative_to(storage).as_posix(),
            notes=(f"{found.model} on {_data_words(found)}",),
        )
        write_json_durably(self._directory / SPEC, plan.spec | {"model": found.model})
        write_state(self._directory, self._state)

    def done(self, metrics: dict[str, Any]) -> Path:
        """Keep the metrics; where."""
        write_json_durably(self._directory / EVALUATION, Evaluation(metrics=metrics))
        self._end(status="finished")
        return self._directory

    def failed(self, error: str) -> None:
        """Keep why there are none."""
        self._end(status="failed", error=error)

    def _end(self, **values: Any) -> None:
        now = time.time()
        write_state(self._directory, msgspec.structs.replace(self._state, changed=now, ended=now, **values))
