"""A prepare job of the plan in, its prepared data out: in this process, or by actors of the Ray cluster around it."""

import ray

from cluster.errors import ControlError
from cluster.plan.jobs import JobPlan
from cluster.registry.progress import Progress, no_progress
from train_jobs.data.executors import Executor, InlineExecutor
from train_jobs.data.manifest import Manifest
from train_jobs.data.prepare import prepare
from train_jobs.data.ray_executor import RayDataExecutor
from train_jobs.job import read_prepare


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
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError as error:
        raise ControlError(
            f"{what_for}: this process is on no Ray cluster; start one with `manta up`, and submit the job with "
            "`manta train`, or set workers to 1"
        ) from error
