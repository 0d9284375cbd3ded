"""Load on a gateway while something happens to it: asks in, one Outcome for every request that was ever sent out."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence

from cluster.control.drill.asks import Ask
from cluster.control.drill.client import Client
from cluster.control.drill.outcome import Outcome

_PAUSE_AFTER_FAILURE_S = 0.2
"""Lanes whose requests fail at once do not become a flood."""
_POLL_S = 0.05


async def ticks(timeout_s: float, period_s: float = _POLL_S) -> AsyncGenerator[float]:
    """The seconds since the start, now and every ``period_s``, for ``timeout_s``."""
    began = time.monotonic()
    while (elapsed_s := time.monotonic() - began) < timeout_s:
        yield elapsed_s
        await asyncio.sleep(period_s)


class Traffic:
    """Sends the asks of a pool in turn, in lanes (the next when one has ended) or at a rate (whatever happens)."""

    def __init__(self, client: Client, asks: Sequence[Ask], patience_s: float) -> None:
        """A request that has not ended after ``patience_s`` is given up."""
        self.outcomes: list[Outcome] = []
        self._client = client
        self._pool = itertools.cycle(enumerate(asks))
        self._tasks: set[asyncio.Task[None]] = set()
        self._patience_s = patience_s
        self._stopping = False

    def start_lanes(self, count: int) -> None:
        """Begin ``count`` lanes, each with one request at a time."""
        for _ in range(count):
            self._begin(self._lane())

    async def _lane(self) -> None:
        while not self._stopping:
            outcome = await self._send_next()
            if outcome.end != "done":
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)

    async def send_at_rate(self, per_second: float, seconds: float) -> None:
        """Send ``per_second`` requests for ``seconds``, whether or not earlier ones have ended."""
        total = int(per_second * seconds)
        async for elapsed_s in ticks(seconds, period_s=min(0.02, 1 / per_second)):
            self._send_up_to(min(total, int(elapsed_s * per_second) + 1))
        self._send_up_to(total)

    def _send_up_to(self, count: int) -> None:
        while len(self.outcomes) < count:
            self._begin(self._client.send(self._next(), self._patience_s))

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def send_each(self, count: int) -> None:
        """Send the next ``count`` asks, one after the other."""
        for _ in range(count):
            await self._send_next()

    async def _send_next(self) -> Outcome:
        outcome = self._next()
        await self._client.send(outcome, self._patience_s)
        return outcome

    def _next(self) -> Outcome:
        number, ask = next(self._pool)
        outcome = Outcome(ask=ask, number=number, sent_at=time.monotonic())
        self.outcomes.append(outcome)
        return outcome

    @property
    def in_flight(self) -> list[Outcome]:
        """Requests that have not ended."""
        return [outcome for outcome in self.outcomes if outcome.end is None]

    @property
    def num_ended(self) -> int:
        """Requests that have ended, in whatever way."""
        return sum(outcome.end is not None for outcome in self.outcomes)

    async def flowing(self, timeout_s: float) -> bool:
        """Wait until half of the requests in flight have brought a token; False when that does not happen."""
        async for _ in ticks(timeout_s):
            open_streams = [outcome for outcome in self.in_flight if outcome.ask.streams]
            if open_streams and 2 * sum(bool(each.token_times) for each in open_streams) >= len(open_streams):
                return True
        return False

    @staticmethod
    async def ended(outcomes: Iterable[Outcome], timeout_s: float) -> bool:
        """Wait until every one of ``outcomes`` has ended; False when one has not after ``timeout_s``."""
        waiting = list(outcomes)
        async for _ in ticks(timeout_s):
            waiting = [outcome for outcome in waiting if outcome.end is None]
            if not waiting:
                return True
        return False

    async def stop(self) -> None:
        """Send nothing more, and wait for what is under way; the patience bounds that."""
        self._stopping = True
        while self._tasks:
            await asyncio.gather(*self._tasks)

    async def abandon(self) -> None:
        """Close every connection now."""
        self._stopping = True
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
