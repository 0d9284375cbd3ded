"""What workers, the monitor and the controller say to each other."""

from dataclasses import dataclass
from typing import Literal

from cluster.runs.log import StepReport
from train_jobs.supervision.watchdog import Stage, Standstill

Order = Literal["go", "pause", "stop"]
"""``pause``: save and wait for the end of the attempt; ``stop``: save and return."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """Where one worker of one attempt is; ``report``, of its last step, is the first worker's."""

    attempt: int
    rank: int
    stage: Stage
    step: int
    report: StepReport | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a worker runs."""

    node_id: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the controller wants to know of the attempt under way."""

    attempt: int
    size: int
    places: dict[int, Place]
    """By rank; those that have begun."""
    begun: bool
    """The first worker is past its start, and so past looking for a checkpoint."""
    stuck: tuple[Standstill, ...]
    all_paused: bool
    order: Order
    stopping: bool
    """The run was asked to end."""
