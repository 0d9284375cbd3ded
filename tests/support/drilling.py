"""Traffic beside a test's own steps: lanes of requests on a thread of their own, judged when the block ends."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cluster.control.drill.asks import Ask
from cluster.control.drill.client import Client
from cluster.control.drill.judge import nothing_failed, one_end_each
from cluster.control.drill.outcome import Outcome
from cluster.control.drill.traffic import Traffic

PATIENCE_S = 120.0


@contextmanager
def traffic(url: str, asks: Sequence[Ask], lanes: int) -> Iterator[list[Outcome]]:
    """Ask in ``lanes`` while the block runs; every request must then have been answered, and have ended once.

    The outcomes grow meanwhile. When the block raises, its error is the one that is seen.
    """
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=loop.run_until_complete, args=(_run(url, asks, lanes, outcomes, stop),))
    thread.start()
    try:
        yield outcomes
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
    for promise in (nothing_failed(outcomes), one_end_each(outcomes)):
        assert promise.kept, promise.detail


async def _run(url: str, asks: Sequence[Ask], lanes: int, outcomes: list[Outcome], stop: asyncio.Event) -> None:
    async with Client(url) as client:
        asking = Traffic(client, asks, PATIENCE_S)
        asking.outcomes = outcomes
        asking.start_lanes(lanes)
        await stop.wait()
        await asking.stop()
