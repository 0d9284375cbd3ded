"""The nouns of a drill: how hard it is, what it plays, what happens meanwhile, and what each scenario showed."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.control.drill.judge import Hit, Pause, Promise
from cluster.control.drill.parts import Parts
from cluster.errors import ControlError

if TYPE_CHECKING:
    from cluster.control.drill.drill import Drill
    from cluster.control.drill.traffic import Traffic


class NotPossible(ControlError):
    """A scenario cannot be played on this cluster; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How hard to drill. Times in seconds."""

    lanes: int = 16
    """Streams open at the same time."""
    min_requests: int = 64
    """Requests of each scenario, at least."""
    patience_s: float = 180.0
    """A request or a recovery that takes longer than this never ends."""
    rounds: int = 1
    """Kills of every stage."""
    load_s: float = 15.0
    """Length of each part of the overload."""
    num_cycles: int = 1000
    """Connections that are opened and dropped."""
    soak_s: float = 600.0
    seed: int = 0
    """Of prompts, sampling, and the moments of the kills."""


@dataclass(slots=True, kw_only=True)
class Phase:
    """What happens while one scenario is played. It may add promises and notes of its own."""

    traffic: "Traffic"
    hits: list[Hit] = field(default_factory=list)
    promises: list[Promise] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: Parts = field(default_factory=dict)
    """Of the recoveries, by the replicas' own account."""
    judged: bool = True
    """Whether the usual promises hold for its requests; an overload has its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Something that happens to a cluster under traffic; ``play`` raises NotPossible where it cannot."""

    name: str
    summary: str
    play: "Callable[[Drill, Phase], Awaitable[None]]"
    by_default: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one scenario showed."""

    scenario: str
    skipped: str | None = None
    """Why it was not played."""
    num_requests: int = 0
    num_failed: int = 0
    num_changed: int | None = None
    """None where answers cannot be compared."""
    pause: Pause | None = None
    parts: Parts = field(default_factory=dict)
    promises: tuple[Promise, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return all(promise.kept for promise in self.promises)
