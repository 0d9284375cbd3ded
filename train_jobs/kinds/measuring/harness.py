"""An evaluate job with ``harness`` in; its model found, and lm-eval's tasks put to it, out."""

import hashlib
from dataclasses import asdict
from functools import partial
from pathlib import Path

from cluster.config.schema import ClusterConfig
from cluster.control.report import Report
from cluster.errors import PlanError
from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from train_jobs.bases import find_version
from train_jobs.job import EvaluateSpec, HarnessSpec
from train_jobs.kinds.measuring.exam import Exam, check_tasks, installed_version, sit_exam
from train_jobs.kinds.measuring.found import Found, Measured
from train_jobs.kinds.measuring.outcome import read_outcome
from train_jobs.tasks.spec import Checkpoint


def find(config: ClusterConfig, spec: EvaluateSpec, harness: HarnessSpec, report: Report) -> Found:
    """The model; PlanError when lm-eval is not installed, the folder is missing, or the model is of another kind."""
    tasks_digest = None if harness.include is None else _folder_digest(spec.name, Path(harness.include))
    lm_eval_version = installed_version(spec.name)
    registry = Registry(config.storage_root)
    version = find_version(spec.model, spec.name, "generate", config.models, registry, report.progress)
    if version.task != "generate":
        raise PlanError(
            f"jobs.{spec.name}.model: {spec.model} is {version.reference}, of task {version.task}; lm-eval measures "
            "models of task generate, give one, or write `data:` instead of `harness:`"
        )
    directory = materialize(registry, version, progress=report.progress)
    exam = Exam(
        job=spec.name,
        harness=harness,
        checkpoint=Checkpoint(directory=directory, name=f"registry://{version.reference}"),
        batch_sequences=spec.batch_sequences,
        threads=spec.resources.threads,
        gpu=spec.resources.gpus > 0,
    )
    question = f"{', '.join(harness.tasks)} of lm-eval {lm_eval_version}"
    return Found(
        model=version.reference,
        question=question,
        defining={"harness": asdict(harness), "include": tasks_digest, "lm_eval": lm_eval_version},
        data=None,
        look=partial(_look, exam, question),
        measure=partial(_measure, exam),
    )


def _measure(exam: Exam, run_directory: Path) -> Measured:
    return read_outcome(sit_exam(exam, run_directory))


def _look(exam: Exam, question: str) -> dict[str, str]:
    check_tasks(exam)
    return {"harness": question} | _said(exam.harness)


def _said(harness: HarnessSpec) -> dict[str, str]:
    said = {name: value for name, value in asdict(harness).items() if name != "tasks"}
    return {name.replace("_", " "): str(value) for name, value in said.items() if value not in (None, False)}


def _folder_digest(job: str, folder: Path) -> str:
    """Hex sha256 over the names and bytes of the files in a folder."""
    if not folder.is_dir():
        raise PlanError(
            f"jobs.{job}.harness.include: {folder} is not a folder on this machine; write the absolute path of one "
            "that every node has, or remove it"
        )
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
