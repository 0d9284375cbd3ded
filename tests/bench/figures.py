"""Figures of one measured run, ratios between two sides of it, and the goals; times in, numbers out. Pure.

Definitions (a run is a closed loop, see :mod:`tests.bench.closed_loop`; the window is its measured part):

    tok/s   output tokens that reached the client inside the window, per second. A request's tokens are those
            its usage tells, spread evenly over its events, because a server may put several tokens in one event; a
            request that the window's end cut off counts as many per event as the complete ones on average.
    TTFT    from sending a request to its first event with text, over the first events inside the window.
    ITL     between two neighbouring events with text of one stream, over the gaps that end inside the window.
    ratio   of one side to the other, repeat by repeat: the median, the lowest and the highest.

What arrives inside the window counts, wherever it was sent: to count what was sent inside it would leave out the
slowest requests of a slow server.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(slots=True, kw_only=True)
class Record:
    """One request as its client saw it; times are of one clock, in seconds."""

    sent_s: float
    event_times: list[float] = field(default_factory=list)
    """When each event with text came."""
    num_tokens: int | None = None
    """Output tokens, as the server counted them at the end; None when the request was cut off."""
    num_prompt_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Percentiles in milliseconds over ``count`` observations."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one run came to."""

    tokens_per_s: float
    first_token: Latency | None
    """None when nothing arrived in the window."""
    gap: Latency | None
    num_done: int
    """Requests that ended well, warm-up included."""
    num_errors: int
    first_error: str | None
    tokens_per_event: float
    num_prompt_tokens: tuple[int, int] | None
    """Least and most of the prompts, as the server counted them."""


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value below which ``fraction`` of ``values`` lie, linearly interpolated; ValueError when there is none."""
    if not values:
        raise ValueError("there is no percentile of nothing")
    if not 0 <= fraction <= 1:
        raise ValueError(f"a percentile's fraction is {fraction}; it must be within 0 and 1")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def latency(seconds: Sequence[float]) -> Latency | None:
    """Percentiles of durations; None when there is none."""
    if not seconds:
        return None
    p50, p95, p99 = (percentile(seconds, fraction) * 1e3 for fraction in (0.5, 0.95, 0.99))
    return Latency(p50_ms=p50, p95_ms=p95, p99_ms=p99, count=len(seconds))


def figures(records: Sequence[Record], start_s: float, stop_s: float) -> Figures:
    """What arrived within [start_s, stop_s); see the module's docstring for the definitions."""
    good = [record for record in records if record.error is None]
    errors = [record.error for record in records if record.error is not None]
    done = [record for record in good if record.num_tokens is not None and record.event_times]
    num_events = sum(len(record.event_times) for record in done)
    mean_per_event = sum(record.num_tokens or 0 for record in done) / num_events if num_events else 1.0
    num_tokens = 0.0
    for record in good:
        known = record.num_tokens is not None and record.event_times
        per_event = record.num_tokens / len(record.event_times) if known and record.num_tokens else mean_per_event
        num_tokens += per_event * _count_within(record.event_times, start_s, stop_s)
    firsts = [r.event_times[0] - r.sent_s for r in good if _count_within(r.event_times[:1], start_s, stop_s)]
    gaps = [
        after - before
        for record in good
        for before, after in zip(record.event_times, record.event_times[1:], strict=False)
        if start_s <= after < stop_s
    ]
    prompts = [record.num_prompt_tokens for record in done if record.num_prompt_tokens is not None]
    return Figures(
        tokens_per_s=num_tokens / (stop_s - start_s),
        first_token=latency(firsts),
        gap=latency(gaps),
        num_done=len(done),
        num_errors=len(errors),
        first_error=errors[0] if errors else None,
        tokens_per_event=mean_per_event,
        num_prompt_tokens=(min(prompts), max(prompts)) if prompts else None,
    )


def _count_within(times: Iterable[float], start_s: float, stop_s: float) -> int:
    return sum(start_s <= at < stop_s for at in times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One side over the other: median and extremes of the repeats."""

    value: float
    lowest: float
    highest: float


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Repeat by repeat; ValueError when the numbers of repeats differ, or a side measured nothing."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} repeats of one side cannot be set against {len(theirs)} of the other")
    if min(theirs) <= 0:
        raise ValueError(f"the other side measured {min(theirs)}; there is no ratio to it")
    single = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(value=statistics.median(single), lowest=min(single), highest=max(single))


Measure = Literal["tok/s", "TTFT p50"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A bound on a ratio of Manta to a peer; ``weights`` names Manta's variants that it is asked of, None for all."""

    workload: str
    peer: str
    measure: Measure
    bound: float
    weights: tuple[str, ...] | None = None

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.measure == "tok/s"

    def met(self, found: float) -> bool:
        """Whether a ratio reaches the goal."""
        return found >= self.bound if self.at_least else found <= self.bound

    def __str__(self) -> str:
        """As in a table's cell."""
        return f"{'>=' if self.at_least else '<='} {self.bound:g}x"


QUANTIZED = ("int8", "int4")


def _throughput(peer: str, **bounds: float) -> tuple[Goal, ...]:
    return tuple(Goal(workload=name, peer=peer, measure="tok/s", bound=bound) for name, bound in bounds.items())


GOALS = (
    Goal(workload="W1", peer="vllm", measure="tok/s", bound=2.0, weights=("bf16", "bf16 undrafted", "bf16 2x1")),
    Goal(workload="W1", peer="vllm", measure="tok/s", bound=3.5, weights=QUANTIZED),
    Goal(workload="W1", peer="llama.cpp", measure="tok/s", bound=1.0, weights=QUANTIZED),
    *_throughput("vllm", W2=1.3, W3=1.3, W4=1.3, W5=1.2, W6=1.3),
    *_throughput("llama.cpp", W2=2.5, W3=2.5, W4=2.5, W5=5.0, W6=3.5),
    Goal(workload="W5", peer="vllm", measure="TTFT p50", bound=1.0),
    Goal(workload="W6", peer="vllm", measure="TTFT p50", bound=0.7),
)


def goals_for(workload: str, peer: str, variant: str) -> list[Goal]:
    """What is asked of one of Manta's variants against one peer."""
    return [
        goal
        for goal in GOALS
        if (goal.workload, goal.peer) == (workload, peer) and (goal.weights is None or variant in goal.weights)
    ]
