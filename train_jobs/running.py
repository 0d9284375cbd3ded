"""A job's name in; the job done, or looked at without doing it, and what is shown of it out.

Each kind of job has a module with ``run`` and ``look``, which is imported when a job of that kind is there: preparing
data needs no torch.
"""

from importlib import import_module
from typing import Literal

from cluster.config.schema import ClusterConfig
from cluster.control.report import Report
from cluster.errors import PlanError
from cluster.plan.jobs import JobKind, plan_job
from train_jobs.views.shown import Shown

MODULES: dict[JobKind, str] = {
    "prepare": "train_jobs.kinds.prepare",
    "train": "train_jobs.kinds.train",
    "tune": "train_jobs.kinds.tune",
    "evaluate": "train_jobs.kinds.evaluate",
}
"""Where ``run(config, plan, report)`` and ``look(config, plan, report)`` of each kind are; both return Shown."""


def do(config: ClusterConfig, name: str, report: Report, *, what: Literal["run", "look"]) -> Shown:
    """Do job ``name`` to its end, or look at what it would do; MantaError says what is in the way."""
    plan = plan_job(config, name)
    module = MODULES[plan.kind]
    try:
        function = getattr(import_module(module), what)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise PlanError(f"jobs.{name}.kind: this installation cannot run jobs of kind {plan.kind}") from error
    shown: Shown = function(config, plan, report)
    return shown
