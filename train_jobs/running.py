"""A job's name in; the job done, or looked at without doing it, and what a person or a program is shown of it out."""

from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import RenderableType

from cluster.config.schema import ClusterConfig
from cluster.control.report import Report
from cluster.errors import PlanError
from cluster.plan.jobs import JobPlan, plan_job
from train_jobs.data.manifest import Manifest
from train_jobs.data.prepare import find_current, prepared_directory
from train_jobs.job import read_prepare
from train_jobs.preparing import run_prepare
from train_jobs.resolving import look_at_data, resolve
from train_jobs.tables import data_view, prepare_view, train_values, train_view
from train_jobs.training import run_train
from train_jobs.training_tables import trained_values, trained_view


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A result, as a table and as JSON values."""

    view: RenderableType
    values: dict[str, Any]


def run(config: ClusterConfig, name: str, report: Report) -> Shown:
    """Do job ``name`` to its end; MantaError says what is in the way."""
    plan = plan_job(config, name)
    match plan.kind:
        case "prepare":
            return _prepared(config, plan, run_prepare(plan, config.storage_root, report.progress))
        case "train":
            trained = run_train(config, plan, report)
            return Shown(view=trained_view(trained), values=trained_values(trained))
        case _:
            raise PlanError(f"jobs.{name}: kind {plan.kind} cannot be run yet")


def dry_run(config: ClusterConfig, name: str, report: Report) -> Shown:
    """What job ``name`` would do; raises what would be in its way."""
    plan = plan_job(config, name)
    match plan.kind:
        case "prepare":
            return _look_at_data(config, plan, report)
        case "train":
            resolved = resolve(config, plan, look_at_data(config, plan, report.progress), report.progress)
            return Shown(view=train_view(resolved), values=train_values(resolved))
        case _:
            raise PlanError(f"jobs.{name}: kind {plan.kind} cannot be run yet")


def _prepared(config: ClusterConfig, plan: JobPlan, manifest: Manifest) -> Shown:
    directory = prepared_directory(config.storage_root, plan.name, manifest.digest)
    values = {"job": plan.name, "directory": str(directory), "manifest": msgspec.to_builtins(manifest)}
    return Shown(view=data_view(manifest), values=values)


def _look_at_data(config: ClusterConfig, plan: JobPlan, report: Report) -> Shown:
    spec = read_prepare(plan)
    manifest = find_current(spec, config.storage_root, report.progress)
    if manifest is not None:
        return _prepared(config, plan, manifest)
    return Shown(view=prepare_view(plan, spec), values={"job": plan.name, "manifest": None, "spec": plan.spec})
