"""An evaluate job of the plan in, the metrics of a registry version out, kept in a run directory."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import ray

from cluster.config.schema import ClusterConfig
from cluster.control.report import Report
from cluster.durable import write_json_durably
from cluster.errors import MantaError
from cluster.plan.jobs import JobPlan
from cluster.runs.files import EVALUATION, SPEC, run_directory, storage_directory
from cluster.runs.record import Evaluation
from cluster.runs.state import RunState, write_state
from train_jobs.job import EvaluateSpec, read_evaluate
from train_jobs.kinds.measuring import harness, prepared
from train_jobs.kinds.measuring.found import Found, Measured
from train_jobs.kinds.prepare import connect
from train_jobs.views.metrics import metrics_view
from train_jobs.views.shown import Shown
from train_jobs.views.tables import pairs

_ADDRESS = "RAY_ADDRESS"
"""Where a submitted job finds its cluster."""


def run(config: ClusterConfig, plan: JobPlan, report: Report) -> Shown:
    """Measure the job's model, on its data, which are prepared first where they are not, or by tasks of lm-eval.

    PlanError, DataError and EvaluationError say why the two do not go together.
    """
    spec = read_evaluate(plan)
    found = _find(config, plan, spec, report)
    heading = f"{found.model} on {found.question}"
    report.say(f"Evaluating {heading}.")
    kept = _Run(config, plan, found)
    try:
        measured = _somewhere(spec, found.measure, kept.directory)
    except Exception as error:
        kept.failed(str(error))
        raise
    kept.done(measured)
    values: dict[str, Any] = {"job": plan.name, "model": found.model, "run_directory": str(kept.directory)}
    values |= {"metrics": measured.metrics, "notes": list(measured.notes)}
    return Shown(view=metrics_view(heading, measured.metrics, measured.notes), values=values)


def look(config: ClusterConfig, plan: JobPlan, report: Report) -> Shown:
    """What would be measured; the model and the data's sources are downloaded, and the data prepared, to know."""
    spec = read_evaluate(plan)
    found = _find(config, plan, spec, report)
    facts = {"model": found.model, **found.look(), "at a time": f"{spec.batch_sequences} sequences"}
    return Shown(view=pairs(list(facts.items())), values={"job": plan.name, **facts})


def _find(config: ClusterConfig, plan: JobPlan, spec: EvaluateSpec, report: Report) -> Found:
    if spec.harness is None:
        return prepared.find(config, plan, spec, report)
    return harness.find(config, spec, spec.harness, report)


def _somewhere(spec: EvaluateSpec, measure: Callable[[Path], Measured], directory: Path) -> Measured:
    """In a Ray task with the job's resources; in this process when it is not on a cluster, and asks for no GPU."""
    if not (spec.resources.gpus or ray.is_initialized() or _ADDRESS in os.environ):
        return measure(directory)
    connect(f"jobs.{spec.name}.resources.gpus: {spec.resources.gpus}")
    task = ray.remote(_measure).options(num_cpus=spec.resources.cpus, num_gpus=spec.resources.gpus, max_retries=1)
    try:
        measured: Measured = ray.get(task.remote(measure, directory))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, MantaError) else error) from error
    return measured


def _measure(measure: Callable[[Path], Measured], directory: Path) -> Measured:
    return measure(directory)


class _Run:
    """The run directory of an evaluation; asking the same of the same version again replaces it."""

    def __init__(self, config: ClusterConfig, plan: JobPlan, found: Found) -> None:
        defining = {"model": found.model, **found.defining}
        digest = hashlib.sha256(msgspec.json.encode(defining, order="deterministic")).hexdigest()
        storage = storage_directory(config.storage_root)
        self.directory = run_directory(storage, plan.name, digest)
        self.directory.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._state = RunState(
            run_id=self.directory.name,
            job=plan.name,
            kind="evaluate",
            status="running",
            began=now,
            changed=now,
            data_directory=None if found.data is None else found.data.relative_to(storage).as_posix(),
            notes=(f"{found.model} on {found.question}",),
        )
        write_json_durably(self.directory / SPEC, plan.spec | {"model": found.model})
        write_state(self.directory, self._state)

    def done(self, measured: Measured) -> None:
        """Keep the metrics, and how they are to be read."""
        write_json_durably(self.directory / EVALUATION, Evaluation(metrics=dict(measured.metrics)))
        self._end(status="finished", notes=(*self._state.notes, *measured.notes))

    def failed(self, error: str) -> None:
        """Keep why there are none."""
        self._end(status="failed", error=error)

    def _end(self, **values: Any) -> None:
        now = time.time()
        write_state(self.directory, msgspec.structs.replace(self._state, changed=now, ended=now, **values))
