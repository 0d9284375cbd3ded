"""A closed loop: a fixed number of lanes, each sending its next request when the last one has ended.

The first request of each lane has a length of its own, so that the lanes do not run in step. The window opens when
every lane has seen its first token, and not before the warm-up is over; at its end everything is cut off. Answers
are only time-stamped meanwhile, and read afterwards.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from tests.bench.figures import Figures, Record, figures
from tests.bench.machine import CpuClock, CpuUse
from tests.bench.workloads import Workload

_LONGEST_WARM_UP_S = 120.0
_POLL_S = 0.05
_PAUSE_AFTER_ERROR_S = 0.2

Side = TypeVar("Side")


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request: when it was sent, and what came back when."""

    sent_s: float
    arrivals: list[tuple[float, Any]] = field(default_factory=list)
    failure: str | None = None


class Source(Protocol):
    """Something that answers prompts: a server, or an engine in this process."""

    async def stream(self, prompt: str, max_tokens: int, exchange: Exchange) -> None:
        """Send one request; add what comes to ``exchange`` at once. Cancelled when the window ends."""

    def read(self, exchange: Exchange) -> Record:
        """Make sense of what came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One workload on one target: the figures, and who used the cores meanwhile."""

    figures: Figures
    cpu: CpuUse

    def __str__(self) -> str:
        """As told while a benchmark runs."""
        first = self.figures.first_token
        return f"{self.figures.tokens_per_s:.1f} tok/s" + (f", TTFT p50 {first.p50_ms:.0f} ms" if first else "")


def turns(sides: Sequence[Side], num_rounds: int) -> Iterator[tuple[int, Side]]:
    """Round by round every side, who goes first changing, so that a machine whose speed swings treats all alike."""
    for number in range(num_rounds):
        yield from ((number, side) for side in (sides if number % 2 == 0 else reversed(sides)))


async def measure(
    source: Source,
    workload: Workload,
    prompts: Iterator[str],
    *,
    clock: CpuClock,
    warm_up_s: float,
    seconds: float,
) -> Point:
    """Run the loop and read its figures; RuntimeError when no lane ever got an answer."""
    exchanges: list[Exchange] = []
    lanes = [
        asyncio.create_task(_lane(source, workload, prompts, exchanges, number))
        for number in range(workload.num_streams)
    ]
    try:
        await _warm_up(source, lanes, exchanges, warm_up_s)
        before, start_s = clock.read(), time.perf_counter()
        await asyncio.sleep(seconds)
        stop_s, after = time.perf_counter(), clock.read()
    finally:
        for lane in lanes:
            lane.cancel()
        ends = await asyncio.gather(*lanes, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end
    return Point(
        figures=figures([source.read(exchange) for exchange in exchanges], start_s, stop_s), cpu=after - before
    )


async def _lane(
    source: Source, workload: Workload, prompts: Iterator[str], exchanges: list[Exchange], number: int
) -> None:
    share = (number + 1) / workload.num_streams
    max_tokens = max(4, round(workload.output_tokens * share))
    while True:
        exchange = Exchange(sent_s=time.perf_counter())
        exchanges.append(exchange)
        prompt = next(prompts)
        exchange.sent_s = time.perf_counter()
        await source.stream(prompt, max_tokens, exchange)
        if exchange.failure is not None or not exchange.arrivals:
            await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
        max_tokens = workload.output_tokens


async def _warm_up(
    source: Source, lanes: list[asyncio.Task[None]], exchanges: list[Exchange], warm_up_s: float
) -> None:
    begin, waiting = time.perf_counter(), list(range(len(lanes)))
    while True:
        await asyncio.sleep(_POLL_S)
        elapsed = time.perf_counter() - begin
        for lane in lanes:
            if lane.done():
                lane.result()  # it never returns, so this raises why it ended
        first = exchanges[: len(lanes)]
        waiting = [index for index in waiting if index >= len(first) or not source.read(first[index]).event_times]
        if elapsed >= warm_up_s and not waiting:
            return
        if elapsed > _LONGEST_WARM_UP_S:
            failure = next((exchange.failure for exchange in exchanges if exchange.failure), "nothing came back")
            raise RuntimeError(
                f"{len(waiting)} of {len(lanes)} lanes got no token within {_LONGEST_WARM_UP_S:g} s: {failure}"
            )
