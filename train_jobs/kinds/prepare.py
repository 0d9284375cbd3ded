"""A prepare job of the plan in, its prepared data out: in this process, or by actors of the Ray cluster around it."""

import logging

import msgspec
import ray

from cluster.config.schema import ClusterConfig
from cluster.control.report import Report
from cluster.errors import ControlError
from cluster.plan.jobs import JobPlan
from cluster.registry.progress import Progress, no_progress
from cluster.runs.files import prepared_directory, storage_directory
from cluster.runs.prepared import Manifest
from train_jobs.data.executors import Executor, InlineExecutor
from train_jobs.data.prepare import find_current, prepare
from train_jobs.data.ray_executor import RayDataExecutor
from train_jobs.job import read_prepare
from train_jobs.views.data import data_view, prepare_view
from train_jobs.views.shown import Shown


def run(config: ClusterConfig, plan: JobPlan, report: Report) -> Shown:
    """Prepare the data, unless they are there."""
    return _shown(config, plan, run_prepare(plan, config.storage_root, report.progress))


def look(config: ClusterConfig, plan: JobPlan, report: Report) -> Shown:
    """What is there, or what would be prepared; sources are downloaded to know."""
    spec = read_prepare(plan)
    manifest = find_current(spec, config.storage_root, report.progress)
    if manifest is not None:
        return _shown(config, plan, manifest)
    return Shown(view=prepare_view(plan, spec), values={"job": plan.name, "manifest": None, "spec": plan.spec})


def _shown(config: ClusterConfig, plan: JobPlan, manifest: Manifest) -> Shown:
    directory = prepared_directory(storage_directory(config.storage_root), plan.name, manifest.digest)
    values = {"job": plan.name, "directory": str(directory), "manifest": msgspec.to_builtins(manifest)}
    return Shown(view=data_view(manifest), values=values)


def run_prepare(plan: JobPlan, storage: str, progress: Progress = no_progress) -> Manifest:
    """The manifest of the job's data, prepared unless it is there; errors are those of ``data.prepare``."""
    return prepare(read_prepare(plan), storage, _executor(plan), progress)


def _executor(plan: JobPlan) -> Executor:
    if plan.workers.max == 1:
        return InlineExecutor()
    connect(f"jobs.{plan.name}.workers: {plan.workers.max}")
    return RayDataExecutor(max_workers=plan.workers.max, cpus_per_worker=plan.resources.cpus)


def connect(what_for: str) -> None:
    """Connect this process to the Ray cluster around it; ControlError, naming ``what_for``, when there is none."""
    if ray.is_initialized():
        return
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ControlError(
            f"{what_for}: this process is on no Ray cluster; start one with `manta up`, and submit the job with "
            "`manta train`, or set workers to 1"
        ) from error
