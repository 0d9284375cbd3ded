"""One gateway's conversation with this replica: requests in, replies out, until the gateway leaves.

What the requests of a connection say in one turn of the event loop, which is what one step of the engine brought,
leaves in one frame. With many of them, tokens after a choice's first wait a little for those of the next step.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Protocol

from numpy import float32
from numpy.typing import NDArray

from deployments.channel import Channel, ChannelError
from deployments.messages import (
    Cancel,
    Classified,
    Classify,
    Delta,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    Finished,
    Generate,
    Load,
    Opened,
    Refused,
    Replies,
    RequestRefused,
    Started,
    Tokenize,
    Tokenized,
    refuse,
)

logger = logging.getLogger(__name__)

LOAD_PERIOD_S = 1.0
MANY_STREAMS = 16
"""With so many requests open on one connection, tokens of several steps travel together: fewer wakings, writes and
events. Not where a step takes longer than a token would wait."""
PATIENCE_S = 0.04
"""How long a token waits for others then; 25 times a second reads as a flow."""

Asked = Generate | Embed | Classify | Tokenize | Detokenize
StreamReply = Started | Delta | Finished | Refused


class Service(Protocol):
    """What a replica can be asked; a task that it does not serve is refused as ``unsupported``."""

    def generate(self, request: Generate) -> AsyncGenerator[Started | Delta | Finished]:
        """Events of one request; closing the generator cancels it."""

    async def embed(self, request: Embed) -> tuple[Embedded, NDArray[float32]]:
        """One vector per input."""

    async def classify(self, request: Classify) -> tuple[Classified, NDArray[float32]]:
        """The probability of every label for each input."""

    def tokenize(self, request: Tokenize) -> Tokenized:
        """Token ids of a prompt; called on a thread."""

    def detokenize(self, request: Detokenize) -> Detokenized:
        """Text of token ids; called on a thread."""

    def load(self) -> Load:
        """How busy the replica is."""


class Outbox:
    """Replies that wait for the next frame. Bounded by what the open requests may still generate."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._replies: list[StreamReply] = []
        self._held: dict[str, list[StreamReply]] = {}
        self._release_due: asyncio.TimerHandle | None = None
        self._filled = asyncio.Event()

    def put(self, reply: StreamReply) -> None:
        """Send ``reply`` after what is held of its request, with all that comes in this turn of the event loop."""
        self._replies += self._held.pop(reply.request_id, ())
        self._replies.append(reply)
        self._filled.set()

    def hold(self, reply: StreamReply) -> None:
        """Send ``reply`` with what comes within ``PATIENCE_S``, or with the next one that is put for its request."""
        self._held.setdefault(reply.request_id, []).append(reply)
        if self._release_due is None:
            self._release_due = asyncio.get_running_loop().call_later(PATIENCE_S, self._release)

    def forget(self, request_id: str) -> None:
        """What waits of a cancelled request is not sent: its id may soon be that of another attempt."""
        self._held.pop(request_id, None)
        self._replies = [reply for reply in self._replies if reply.request_id != request_id]

    def _release(self) -> None:
        if self._release_due is not None:
            self._release_due.cancel()
            self._release_due = None
        for held in self._held.values():
            self._replies += held
        self._held.clear()
        self._filled.set()

    def flush(self) -> None:
        """Hand over to the transport what waits; ChannelError when the connection is gone."""
        self._release()
        if self._replies:
            replies, self._replies = self._replies, []
            self._channel.send_nowait(Replies(replies=tuple(replies)))

    def close(self) -> None:
        """Nobody listens any more."""
        if self._release_due is not None:
            self._release_due.cancel()

    async def send_forever(self) -> None:
        """One frame after another; a gateway that lags gets fewer and larger ones. Raises ChannelError."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            replies, self._replies = self._replies, []
            if replies:
                await self._channel.send(Replies(replies=tuple(replies)))


class GatewaySession:
    """Runs every request of one connection in a task of its own; all are cancelled when the connection ends."""

    def __init__(self, channel: Channel, service: Service) -> None:
        self._channel = channel
        self._service = service
        self._outbox = Outbox(channel)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until the gateway leaves; a message that does not belong here ends the conversation."""
        opened, _ = await self._channel.receive(timeout_s=10.0)
        if not isinstance(opened, Opened) or opened.role != "gateway":
            return
        own = (asyncio.create_task(self._report_load()), asyncio.create_task(self._outbox.send_forever()))
        try:
            while True:
                message, _ = await self._channel.receive()
                if isinstance(message, Cancel):
                    self._cancel(message.request_id)
                elif isinstance(message, Asked):
                    self._begin(message)
                else:
                    logger.error("a gateway sent a %s; closing", type(message).__name__)
                    return
        except ChannelError:
            return  # the gateway is gone; what it had asked for is cancelled below
        finally:
            tasks = (*own, *self._tasks.values(), *self._cancelled)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._outbox.close()

    def _cancel(self, request_id: str) -> None:
        task = self._tasks.pop(request_id, None)  # the id is free: the next message may be another attempt
        if task is not None:
            task.cancel()
            self._cancelled.add(task)
            self._outbox.forget(request_id)

    def _begin(self, request: Asked) -> None:
        if request.request_id in self._tasks:
            self._outbox.put(
                refuse(request.request_id, "invalid_request", "this request id is already in use").refused
            )
            return
        task = asyncio.create_task(self._answer(request))
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda task: self._drop(request.request_id, task))

    def _drop(self, request_id: str, task: asyncio.Task[None]) -> None:
        self._cancelled.discard(task)
        if self._tasks.get(request_id) is task:
            del self._tasks[request_id]

    async def _answer(self, request: Asked) -> None:
        begin = time.monotonic()
        outcome = "cancelled"
        try:
            outcome = await self._try_answer(request)
        finally:
            extra = {"request_id": request.request_id, "outcome": outcome}
            kind = type(request).__name__.lower()
            logger.info("%s ended after %.3f s: %s", kind, time.monotonic() - begin, outcome, extra=extra)

    async def _try_answer(self, request: Asked) -> str:
        """Answer and say how it ended: ``done``, ``refused``, ``unreachable`` or ``failed``."""
        try:
            match request:
                case Generate():
                    await self._stream(request)
                case Embed():
                    embedded, vectors = await self._service.embed(request)
                    await self._channel.send(embedded, [vectors.tobytes()])
                case Classify():
                    classified, probabilities = await self._service.classify(request)
                    await self._channel.send(classified, [probabilities.tobytes()])
                case Tokenize():
                    await self._channel.send(await asyncio.to_thread(self._service.tokenize, request))
                case Detokenize():
                    await self._channel.send(await asyncio.to_thread(self._service.detokenize, request))
        except RequestRefused as error:
            self._outbox.put(error.refused)
            return "refused"
        except ChannelError:
            return "unreachable"  # the reader sees it too and ends the session
        except Exception as error:
            logger.exception("request %s failed", request.request_id)
            self._outbox.put(refuse(request.request_id, "internal", f"the replica failed: {error!r}").refused)
            return "failed"
        return "done"

    async def _stream(self, request: Generate) -> None:
        events = self._service.generate(request)
        last_s: dict[int, float] = {}
        try:
            async for event in events:
                now = time.monotonic()
                if len(self._tasks) >= MANY_STREAMS and _can_wait(event, last_s, now):
                    self._outbox.hold(event)
                else:
                    self._outbox.put(event)
                if isinstance(event, Delta) and event.text:
                    last_s[event.index] = now
        finally:
            await events.aclose()

    def report_load(self) -> None:
        """Tell the load now: it says something that the gateway should not wait for."""
        with suppress(ChannelError):  # the session is about to end
            self._channel.send_nowait(self._service.load())

    async def finish(self) -> None:
        """Return when every request has been answered, and the last answers are on their way."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        with suppress(ChannelError):
            self._outbox.flush()

    async def _report_load(self) -> None:
        while True:
            await self._channel.send(self._service.load())
            await asyncio.sleep(LOAD_PERIOD_S)


def _can_wait(event: StreamReply, last_s: Mapping[int, float], now: float) -> bool:
    """Not what begins or ends a choice, nor what took so long after the text before (``last_s``) that it is late."""
    if not isinstance(event, Delta) or event.finish_reason is not None:
        return False
    return now - last_s.get(event.index, -math.inf) < PATIENCE_S
