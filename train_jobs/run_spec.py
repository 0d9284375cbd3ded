"""What a launched run is told, besides its training spec: who it is, what its workers need, when to give up."""

from dataclasses import dataclass
from typing import Any

from cluster.errors import PlanError
from train_jobs.trainer.spec import TrainSpec, data_workers

TRAIN_SLOT = "train_slot"
"""Custom resource of Ray: how many training workers a node takes."""


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
    run_id: str
    """Names the run directory; submitting the same id again continues the run."""
    storage: str
    """Absolute directory that every node reaches."""
    train: TrainSpec
    min_workers: int
    max_workers: int
    """More than ``min_workers``: the number of workers follows what the cluster has free."""
    needs: WorkerNeeds
    step_timeout_s: float
    """A worker that has begun no new step for this long is stuck; evaluations and checkpoints are parts of steps."""
    grow_after_s: float
    """Room for more workers must have been there for this long before a run stops to grow into it."""
    max_losses: int
    """Lost workers, one time after the other without a new checkpoint between, after which the run has failed."""
    materials: str
    """``module:function`` that takes ``arguments`` and returns the run's Materials, on every worker."""
    arguments: Any
    code_digest: str


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
        raise refusal or PlanError(f"workers: {spec.min_workers} to {spec.max_workers} is no number; write min <= max")
    return tuple(sizes)


def check_size(train: TrainSpec, size: int) -> None:
    """Raises PlanError when ``size`` workers cannot form the strategy or share the batch equally."""
    shares = data_workers(train.strategy, size)
    batch = train.batch
    if batch.sequences % (shares * batch.micro_sequences):
        raise PlanError(
            f"batch.sequences: {batch.sequences} sequences are not a multiple of {shares} shares x "
            f"{batch.micro_sequences} micro_sequences; change one of them, or the number of workers"
        )
