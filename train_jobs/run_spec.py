"""What a launched run is told, besides its training spec: who it is, what its workers need, when to give up."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config.nodes import TRAIN_SLOT
from cluster.errors import PlanError
from train_jobs.trainer.committed import CHECKPOINTS
from train_jobs.trainer.duration import num_micro_batches
from train_jobs.trainer.spec import TrainSpec, data_workers


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerNeeds:
    """What each worker asks Ray for; ``threads`` is what torch computes with."""

    cpus: float
    gpus: float
    threads: int

    def resources(self) -> dict[str, float]:
        """Ray resource names to amounts."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, TRAIN_SLOT: 1.0}
        return {name: amount for name, amount in asked.items() if amount}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One run of one job, with resolved values only."""

    job: str
    run_dir: Path
    """Below a storage that every node reaches; its name is the run's id. Launching it again continues the run."""
    data_directory: str | None
    """Prepared data it reads, relative to the storage."""
    train: TrainSpec
    min_workers: int
    max_workers: int
    """More than ``min_workers``: the number of workers follows what the cluster has free."""
    needs: WorkerNeeds
    start_timeout_s: float
    """A worker that has not begun its first step for this long is stuck."""
    step_timeout_s: float
    """A worker that has begun no new step for this long is stuck; checkpoints are parts of steps."""
    resize_delay_s: float
    """Room for more workers must have been there for this long before a run stops to grow into it."""
    max_failures: int
    """Times that workers may be lost one after the other, without a new checkpoint between."""
    materials: str
    """``module:function`` that takes ``arguments`` and returns the run's Materials, on every worker."""
    arguments: Any
    settings: Mapping[str, Any]
    """What was asked for, as JSON values, for people to read in ``spec.json``."""
    code_digest: str

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.run_dir.name

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return self.run_dir / CHECKPOINTS

    @property
    def evaluates_beside(self) -> bool:
        """Whether checkpoints are evaluated by others than the workers; those of GPUs have taken them, and do it."""
        return self.train.evaluation is not None and not self.needs.gpus

    @property
    def stacks(self) -> Path:
        """Where the stacks of stuck workers go."""
        return self.run_dir / "stacks"


def allowed_sizes(spec: RunSpec) -> tuple[int, ...]:
    """Numbers of workers between minimum and maximum that can share the batch equally, ascending.

    PlanError, that of the largest number, when there is none.
    """
    sizes = []
    refusal: PlanError | None = None
    for size in range(spec.min_workers, spec.max_workers + 1):
        try:
            check_size(spec.train, size)
        except PlanError as error:
            refusal = error
        else:
            sizes.append(size)
    if not sizes:
        raise refusal or PlanError(
            f"workers: {spec.min_workers} to {spec.max_workers} is no number; write min <= max"
        )
    return tuple(sizes)


def check_size(train: TrainSpec, size: int) -> None:
    """Raises PlanError when ``size`` workers cannot form the strategy or share the batch equally."""
    num_micro_batches(train.batch, data_workers(train.strategy, size))
