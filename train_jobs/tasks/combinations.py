"""What a task is asked to be enters; nothing leaves but an error that says what cannot work, and what can."""

from typing import Literal

from cluster.config.jobs_train import JobTask
from cluster.errors import PlanError
from train_jobs.tasks.spec import AdapterSpec, Architecture, TaskSpec

StrategyKind = Literal["single", "ddp", "fsdp", "hsdp", "pipeline", "parameter_server"]

_NOT_CUT: dict[JobTask, str] = {
    "classify": "a classifier's head reads the whole backbone, which is not cut into stages",
    "dpo": "dpo compares passes of two models over two sides of the data, where a pipeline makes one pass",
}


def check_combination(task: JobTask, strategy: StrategyKind, adapter: AdapterSpec | None) -> None:
    """PlanError when a task, a strategy and an adapter do not go together, whatever the model is."""
    if strategy == "pipeline" and task in _NOT_CUT:
        raise PlanError(f"strategy pipeline with task {task}: {_NOT_CUT[task]}; choose fsdp to spread a large model")
    if adapter is not None:
        _check_adapter(task, adapter)


def _check_adapter(task: JobTask, adapter: AdapterSpec) -> None:
    if task == "classify" and adapter.publish == "adapter":
        raise PlanError(
            "adapter.publish: adapter with task classify: an adapter's files have no place for the labels' names; "
            "set publish: merged"
        )
    if adapter.rank < 1:
        raise PlanError(f"adapter.rank: {adapter.rank}; allowed: 1 or more")
    if adapter.alpha <= 0:
        raise PlanError(f"adapter.alpha: {adapter.alpha}; allowed: more than 0; twice the rank is usual")
    if not 0 <= adapter.dropout < 1:
        raise PlanError(f"adapter.dropout: {adapter.dropout}; allowed: 0 up to, not with, 1")
    if not adapter.targets:
        raise PlanError("adapter.targets: none; name matrices such as q_proj, or write auto")


def check_task(spec: TaskSpec) -> None:
    """PlanError when the parts of a spec contradict each other."""
    if spec.adapter is not None:
        _check_adapter(spec.task, spec.adapter)
    if isinstance(spec.base, Architecture):
        _check_from_scratch(spec)
    if spec.task == "classify":
        _check_labels(spec.labels)
    elif spec.labels is not None:
        raise PlanError(f"task {spec.task}: labels are for classify; prepare the data for {spec.task}")
    if (spec.dpo_beta is not None) != (spec.task == "dpo"):
        raise PlanError(f"task {spec.task}: beta is {spec.dpo_beta}; it belongs to dpo, which needs it; 0.1 is usual")
    if spec.dpo_beta is not None and spec.dpo_beta <= 0:
        raise PlanError(f"beta: {spec.dpo_beta}; allowed: more than 0; 0.1 is usual")


def _check_from_scratch(spec: TaskSpec) -> None:
    if spec.adapter is not None:
        raise PlanError(
            "adapter: it adds to a trained base, and base.architecture starts from random weights; "
            "give base.source, or leave adapter out"
        )
    if spec.task == "dpo":
        raise PlanError(
            "task dpo: it holds the model to its base, and base.architecture starts from random weights; "
            "give base.source, a model that was trained with sft"
        )


def _check_labels(labels: tuple[str, ...] | None) -> None:
    if labels is None or len(labels) < 2:
        found = "none" if not labels else f"only {labels[0]}"
        raise PlanError(f"task classify: labels: {found}; a classifier needs two or more; prepare such data")
    if len(set(labels)) < len(labels):
        raise PlanError(f"task classify: labels: {', '.join(labels)} repeats one; name each once")
