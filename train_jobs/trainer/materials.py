"""What a run trains on and with: a name and its arguments in, a task and opened data out, in every worker."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from cluster.errors import PlanError
from train_jobs.trainer.batches import Readable
from train_jobs.trainer.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """What the trainer is given besides its spec."""

    task: Task
    shards: Readable | Mapping[str, Readable]
    """The training data, or its sides by name."""
    evaluation_data: Any
    """What ``task.evaluate`` reads; None where nothing is evaluated."""


def gather(name: str, arguments: Any) -> Materials:
    """Call ``module:function`` with the arguments; PlanError when there is no such function."""
    module, _, function = name.partition(":")
    try:
        make: Callable[[Any], Materials] = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise PlanError(
            f"materials: {name} cannot be imported on this node: {error}; install the same code"
        ) from error
    return make(arguments)
