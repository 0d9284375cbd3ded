"""The backend streams of one HTTP request in, batches of their deltas out, in the order they arrived.

A task per stream (a pump) copies its events into one bounded queue. Whoever iterates takes all that is there: one
delta when the model is slower than the client, several when it is faster. Leaving the ``async with`` block closes
every stream, whatever the reason.
"""

import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from deployments.gateway.answers import Usage, usage
from deployments.gateway.backend import Backend
from deployments.gateway.call import Call
from deployments.gateway.errors import ApiError
from deployments.messages import Delta, Finished, Generate, Started

MAX_QUEUED_DELTAS = 1024
CLOSE_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)

Batch = list[tuple[int, Delta]]


class MergedStreams:
    """Iterates over batches of (prompt index, delta); an empty batch says that nothing came for ``idle_s``.

    Raises what the first failing stream raised, after everything that came before it.
    """

    def __init__(self, backend: Backend, requests: Sequence[Generate], call: Call, idle_s: float) -> None:
        self._backend = backend
        self._requests = requests
        self._call = call
        self._idle_s = idle_s
        self._queue: Batch = []
        self._num_running = len(requests)
        self._failure: Exception | None = None
        self._idle = False
        self._taken_since_tick = False
        self._taker: asyncio.Future[None] | None = None
        self._room = asyncio.Event()
        self._pumps: list[asyncio.Task[None]] = []
        self._ticker: asyncio.TimerHandle | None = None
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_completion_tokens = 0

    @property
    def usage(self) -> Usage:
        """Tokens of all streams that have finished."""
        return usage(self._num_prompt_tokens, self._num_cached_tokens, self._num_completion_tokens)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._pumps = [loop.create_task(self._pump(index)) for index in range(len(self._requests))]
        self._ticker = loop.call_later(self._idle_s, self._tick)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._ticker is not None
        self._ticker.cancel()
        for pump in self._pumps:
            pump.cancel()
        _, hanging = await asyncio.wait(self._pumps, timeout=CLOSE_TIMEOUT_S)
        if hanging:
            message = "%d streams of request %s did not close within %g s"
            logger.error(message, len(hanging), self._call.request_id, CLOSE_TIMEOUT_S)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        """All deltas that have arrived; waits for the first."""
        while True:
            if self._queue:
                batch, self._queue = self._queue, []
                self._room.set()
                self._taken_since_tick = True
                self._idle = False
                return batch
            if self._failure is not None:
                raise self._failure
            if not self._num_running:
                raise StopAsyncIteration
            if self._idle:
                self._idle = False
                return []
            self._taker = asyncio.get_running_loop().create_future()
            await self._taker

    def _wake(self) -> None:
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)

    def _tick(self) -> None:
        """Every ``idle_s``: one timer for a whole stream; a timeout around every wait would cost one a token."""
        self._idle = not self._taken_since_tick
        self._taken_since_tick = False
        if self._idle:
            self._wake()
        self._ticker = asyncio.get_running_loop().call_later(self._idle_s, self._tick)

    async def _pump(self, index: int) -> None:
        try:
            await self._copy(index)
        except Exception as error:
            self._failure = self._failure or error
        self._num_running -= 1
        self._wake()

    async def _copy(self, index: int) -> None:
        stream = self._backend.generate(self._call.model, self._requests[index])
        finished = False
        try:
            async for event in stream:
                match event:
                    case Delta():
                        await self._put(index, event)
                    case Started():
                        self._call.note_started(event)
                    case Finished():
                        finished = True
                        self._count(event)
        finally:
            await stream.aclose()
        if not finished:
            raise ApiError("internal", "The model's answer stopped before its end.")

    async def _put(self, index: int, delta: Delta) -> None:
        self._call.note_delta(delta)
        self._queue.append((index, delta))
        self._wake()
        while len(self._queue) >= MAX_QUEUED_DELTAS:
            self._room.clear()
            await self._room.wait()

    def _count(self, finished: Finished) -> None:
        self._num_prompt_tokens += finished.num_prompt_tokens
        self._num_cached_tokens += finished.num_cached_tokens
        self._num_completion_tokens += finished.num_completion_tokens
