"""What a train job of the config works with: a TaskSpec and a directory of prepared data in, Materials out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.runs.prepared import SIDES, read_manifest
from train_jobs.data.shards import Shards
from train_jobs.tasks.build import build_task
from train_jobs.tasks.spec import TaskSpec
from train_jobs.trainer.materials import Materials

OPEN = f"{__name__}:open_materials"
"""This module's function, as a RunSpec names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """What is learned, from which data; paths are the same on every node."""

    task: TaskSpec
    directory: Path


def open_materials(prepared: PreparedData) -> Materials:
    """Build the task and open both splits; DataError and PlanError say what is wrong."""
    held_out = read_manifest(prepared.directory).split("eval").num_sequences
    return Materials(
        task=build_task(prepared.task),
        shards=_open(prepared, "train"),
        evaluation_data=_open(prepared, "eval") if held_out else None,
    )


def _open(prepared: PreparedData, split: str) -> Any:
    if prepared.task.task == "dpo":
        return {side: Shards.open(prepared.directory, split, side=side) for side in SIDES}
    return Shards.open(prepared.directory, split)
