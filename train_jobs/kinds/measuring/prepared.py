"""An evaluate job with ``data`` in; its model and prepared data found, and measured by the data's own task, out."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from cluster.config.schema import ClusterConfig
from cluster.control.report import Report
from cluster.errors import PlanError
from cluster.plan.jobs import JobPlan, plan_data
from cluster.plan.types import Task as ServedTask
from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from cluster.runs.files import prepared_directory, storage_directory
from cluster.runs.prepared import TOKENIZER_FOLDER, Manifest
from train_jobs.bases import find_version
from train_jobs.data.fitting import check_fits
from train_jobs.data.shards import Shards
from train_jobs.job import EvaluateSpec
from train_jobs.kinds.measuring.found import Found, Measured
from train_jobs.kinds.prepare import run_prepare
from train_jobs.tasks.build import build_task, outline_model
from train_jobs.tasks.classify import Classifier
from train_jobs.tasks.language import LanguageModel, check_language_model
from train_jobs.tasks.networks import label_names, make_network, stored_config
from train_jobs.tasks.spec import Checkpoint, TaskSpec
from train_jobs.trainer.strategies.strategy import evaluating

_SERVED_AS: dict[str, ServedTask] = {"lm": "generate", "sft": "generate", "classify": "classify"}
"""As what a model from outside the registry is imported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What is measured on what; pickles."""

    task: TaskSpec
    data: Path
    split: str
    threads: int
    gpu: bool


def find(config: ClusterConfig, plan: JobPlan, spec: EvaluateSpec, report: Report) -> Found:
    """The model and the data, which are prepared first where they are not.

    PlanError, DataError and EvaluationError say why the two do not go together.
    """
    assert spec.split is not None, "the plan resolves it"
    if spec.task == "dpo":
        raise PlanError(
            f"jobs.{spec.name}: dpo compares a model with the one it was trained from, which a version alone does "
            "not have; the evaluation of its training run has the numbers"
        )
    registry = Registry(config.storage_root)
    version = find_version(spec.model, spec.name, _SERVED_AS[spec.task], config.models, registry, report.progress)
    manifest = run_prepare(plan_data(config, plan), config.storage_root, report.progress)
    directory = prepared_directory(storage_directory(config.storage_root), manifest.name, manifest.digest)
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
    split, question = manifest.split(spec.split), f"split {spec.split} of {manifest.name}"
    facts = {
        "data": question,
        "documents": f"{split.num_documents:,}",
        "sequences": f"{split.num_sequences:,} of {manifest.sequence_tokens} tokens",
    }
    return Found(
        model=version.reference,
        question=question,
        defining={"data": manifest.digest, "split": spec.split},
        data=directory,
        look=lambda: facts,
        measure=partial(measure, measurement),
    )


def measure(measurement: Measurement, run_directory: Path) -> Measured:  # noqa: ARG001 (as of every question)
    """The metrics, computed in this process."""
    torch.set_num_threads(measurement.threads)
    shards = Shards.open(measurement.data, measurement.split)
    task, model = build_task(measurement.task), _model(measurement.task)
    model.to(torch.device("cuda" if measurement.gpu else "cpu"))
    with evaluating(model):
        return Measured(metrics=dict(task.evaluate(model, shards)))


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
