"""Who is stuck: what each worker last said, and when, in; the workers that have stood still for too long out.

A worker says where it is (a stage of its life and a step) as often as it likes; only a change is a sign of life. When
one is stuck the others wait for it, so all stand still, and the one that began fewest steps is the first suspect.
"""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["starting", "stepping", "waiting", "paused", "ended"]
"""``waiting``, ``paused`` and ``ended`` workers have nothing to do, and are not watched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standstill:
    """A worker that has stood still for ``silent_s`` seconds, over the limit."""

    rank: int
    stage: Stage
    step: int
    silent_s: float

    def __str__(self) -> str:
        """As a person reads it."""
        where = f"in step {self.step}" if self.stage == "stepping" else self.stage
        return f"worker {self.rank} stands still {where} for {self.silent_s:.0f} s"


class Watch:
    """One attempt's workers; times are those of any steady clock, seconds."""

    def __init__(self, num_workers: int, *, start_timeout_s: float, step_timeout_s: float, now: float) -> None:
        self._limits_s = {"starting": start_timeout_s, "stepping": step_timeout_s}
        self._places: dict[int, tuple[Stage, int]] = dict.fromkeys(range(num_workers), ("starting", 0))
        self._since = dict.fromkeys(range(num_workers), now)

    def heard(self, rank: int, stage: Stage, step: int, now: float) -> None:
        """Worker ``rank`` says where it is."""
        if self._places[rank] != (stage, step):
            self._places[rank] = (stage, step)
            self._since[rank] = now

    @property
    def begun(self) -> bool:
        """Whether the first worker has started."""
        return bool(self._places) and self._places[0][0] != "starting"

    def all_in(self, stage: Stage) -> bool:
        """Whether every worker is in this stage."""
        return all(place[0] == stage for place in self._places.values())

    def stuck(self, now: float) -> tuple[Standstill, ...]:
        """Every worker that stands still once one does for too long, first suspects first; empty while all is well.

        Those that still compute are in it too: the attempt ends with them.
        """
        watched = {rank: place for rank, place in self._places.items() if place[0] in self._limits_s}
        if not any(now - self._since[rank] > self._limits_s[place[0]] for rank, place in watched.items()):
            return ()
        found = [
            Standstill(rank=rank, stage=stage, step=step, silent_s=now - self._since[rank])
            for rank, (stage, step) in watched.items()
        ]
        return tuple(sorted(found, key=lambda one: (one.stage != "starting", one.step, -one.silent_s)))
