"""A tune job of the plan in; its trials run, their table kept, and the best of them published, out."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from cluster.config.schema import ClusterConfig
from cluster.control.report import Report
from cluster.durable import write_json_durably
from cluster.plan.jobs import JobPlan, plan_data, plan_job, plan_trial
from cluster.registry.progress import no_progress
from cluster.runs.files import SPEC, prepared_directory, run_directory, storage_directory
from cluster.runs.prepared import Manifest
from cluster.runs.state import RunState, write_state
from cluster.runs.sweep import Sweep, Trial
from train_jobs.job import TuneSpec, read_prepare, read_tune
from train_jobs.kinds.prepare import connect, run_prepare
from train_jobs.kinds.train import publish_plan, run_spec
from train_jobs.launch import launch
from train_jobs.publish import Published, publish_run
from train_jobs.resolving import Resolved, data_of, resolve
from train_jobs.run_spec import RunSpec
from train_jobs.tuning.points import planned_points
from train_jobs.tuning.sweep import run_sweep
from train_jobs.tuning.trials import Table
from train_jobs.views.shown import Shown
from train_jobs.views.sweep import points_view, sweep_view, value_text

TRIALS = "trials"
_FREE_TO_CHANGE = ("name", "trials", "concurrent")
"""Settings of a sweep that do not make it another one: with more trials it goes on."""


def run(config: ClusterConfig, plan: JobPlan, report: Report) -> Shown:
    """Run all trials, from wherever an earlier submission got to, and publish the best; MantaError says why not."""
    spec = read_tune(plan)
    connect(f"jobs.{plan.name}")
    manifest = run_prepare(plan_data(config, plan), config.storage_root, report.progress)
    directory = _directory(config, spec, manifest)
    state = _SweepState(directory, spec, plan, _data(config, manifest))
    make_run = partial(trial_run, config, spec, manifest, directory)
    lines = TrialLines(report)
    try:
        table = run_sweep(spec, make_run, directory, lines.tell)
        best = table.close()
        report.say(f"Trial {best.number} is the best, with {spec.metric} {best.score:.4g}.")
        published = _publish(config, spec, manifest, directory, table, best)
        if table.sweep.published is not None:
            report.say(f"Published {table.sweep.published}.")
    except Exception as error:
        state.end(status="failed", error=str(error))
        raise
    state.end(status="finished", published=table.sweep.published, notes=_notes(published))
    values = {"job": plan.name, "run_directory": str(directory), **msgspec.to_builtins(table.sweep)}
    return Shown(view=sweep_view(table.sweep), values=values)


def look(config: ClusterConfig, plan: JobPlan, report: Report) -> Shown:  # noqa: ARG001 (as of every kind)
    """Which trials there would be; every one that is known before the first begins is checked."""
    spec = read_tune(plan)
    points = planned_points(spec)
    for point in points or ():
        plan_trial(config, spec.job, point)
    return Shown(view=points_view(spec, points), values={"job": plan.name, "points": points, "spec": plan.spec})


def trial_run(
    config: ClusterConfig, spec: TuneSpec, manifest: Manifest, directory: Path, values: Mapping[str, Any]
) -> RunSpec:
    """The run of the varied job with these values, below the sweep's directory; PlanError when it cannot be."""
    run = run_spec(config, _resolve(config, spec, manifest, values))
    return replace(run, job=spec.name, run_dir=directory / TRIALS / run.run_id.removeprefix(f"{spec.job}-"))


def _resolve(config: ClusterConfig, spec: TuneSpec, manifest: Manifest, values: Mapping[str, Any]) -> Resolved:
    plan = plan_trial(config, spec.job, values)
    prepare = read_prepare(plan_data(config, plan))
    return resolve(config, plan, data_of(config, prepare, manifest), no_progress)


def _publish(
    config: ClusterConfig, spec: TuneSpec, manifest: Manifest, directory: Path, table: Table, best: Trial
) -> Published | None:
    """What a run of the best trial's job alone would have published; the run is done, and launched to be found so."""
    publication = publish_plan(config, _resolve(config, spec, manifest, best.values))
    if publication is None:
        return None
    run = trial_run(config, spec, manifest, directory, best.values)
    published = publish_run(run, publication, launch(run, lambda _: None).result)
    table.published(published.version)
    return published


def _notes(published: Published | None) -> tuple[str, ...]:
    return () if published is None else tuple(f"not published: {sentence}" for sentence in published.missed)


def _directory(config: ClusterConfig, spec: TuneSpec, manifest: Manifest) -> Path:
    """``<storage>/runs/<sweep>/<sweep>-<digest of what decides its trials>``."""
    sweep = {name: value for name, value in msgspec.to_builtins(spec).items() if name not in _FREE_TO_CHANGE}
    defining = {"sweep": sweep, "job": plan_job(config, spec.job).spec, "data": manifest.digest}
    digest = hashlib.sha256(msgspec.json.encode(defining, order="deterministic")).hexdigest()
    return run_directory(storage_directory(config.storage_root), spec.name, digest)


def _data(config: ClusterConfig, manifest: Manifest) -> str:
    """Where the prepared data lie, relative to the storage."""
    storage = storage_directory(config.storage_root)
    return prepared_directory(storage, manifest.name, manifest.digest).relative_to(storage).as_posix()


class _SweepState:
    """The sweep's own ``state.json`` and ``spec.json``."""

    def __init__(self, directory: Path, spec: TuneSpec, plan: JobPlan, data: str) -> None:
        """``data`` is the prepared data's directory, relative to the storage."""
        directory.mkdir(parents=True, exist_ok=True)
        write_json_durably(directory / SPEC, plan.spec)
        now = time.time()
        self._directory = directory
        self._state = RunState(
            run_id=directory.name,
            job=spec.name,
            kind="tune",
            status="running",
            began=now,
            changed=now,
            data_directory=data,
        )
        write_state(directory, self._state)

    def end(self, **values: Any) -> None:
        """The last word."""
        now = time.time()
        self._state = msgspec.structs.replace(self._state, changed=now, ended=now, **values)
        write_state(self._directory, self._state)


class TrialLines:
    """Says when a trial begins, is evaluated, and ends."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._told: dict[int, str] = {}

    def tell(self, sweep: Sweep) -> None:
        """What is new about the sweep's trials."""
        for trial in sweep.trials:
            line = _line(sweep, trial)
            if self._told.get(trial.number) != line:
                self._told[trial.number] = line
                self._report.say(line)


def _line(sweep: Sweep, trial: Trial) -> str:
    values = ", ".join(f"{path} {value_text(value)}" for path, value in trial.values.items())
    score = "" if trial.score is None else f", {sweep.metric} {trial.score:.4g} after step {trial.step}"
    why = f": {trial.error}" if trial.error else ""
    return f"Trial {trial.number} ({values}) {trial.status}{score}{why}"
