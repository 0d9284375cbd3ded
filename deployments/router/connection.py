"""One gateway's connection to one replica: many requests share it, each hears only its own replies."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Self

import msgspec

from deployments.channel import Channel, ChannelClosed, ChannelError
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
)

Request = Generate | Embed | Classify | Tokenize | Detokenize
Reply = Started | Delta | Finished | Embedded | Classified | Tokenized | Detokenized | Refused

SILENCE_S = 15.0
"""A replica tells its load about once a second; one that is silent for so long is lost, as its node may be."""

IDLE = Load(num_running=0, num_waiting=0, num_waiting_tokens=0, kv_used_fraction=0.0, draining=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaEndpoint:
    """Where a replica listens for gateways, and the secret it accepts; handed out through Ray.

    ``produces`` is a digest of all that decides its tokens: a stream goes on only where it is the same.
    """

    replica_id: str
    address: str
    secret: bytes = field(repr=False)
    produces: str = ""


class ReplicaLostError(Exception):
    """The connection to a replica broke while a request was open on it."""


class ReplicaLeaving(Exception):
    """The replica drains, and the request is better continued by another one, which is there."""


Arrival = tuple[Reply, list[bytes]] | ChannelError | None
"""A reply with its buffers, the end of the connection, or None: the request is to ask whether it may leave."""


class _Inbox:
    """What came for one request and was not taken yet; all of it is taken at once."""

    __slots__ = ("_arrived", "_waiter")

    def __init__(self) -> None:
        self._arrived: list[Arrival] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, arrival: Arrival) -> None:
        self._arrived.append(arrival)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Arrival]:
        """Everything that arrived; waits for the first."""
        if not self._arrived:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        arrived, self._arrived = self._arrived, []
        return arrived


class ReplicaConnection:
    """Sends requests and hands each its replies; one reader task serves all."""

    def __init__(
        self, endpoint: ReplicaEndpoint, channel: Channel, silence_s: float, on_leaving: Callable[[], None]
    ) -> None:
        self.replica_id = endpoint.replica_id
        self.produces = endpoint.produces
        self.load = IDLE
        self._channel = channel
        self._silence_s = silence_s
        self._on_leaving = on_leaving
        self._inboxes: dict[str, _Inbox] = {}
        self._lost: ChannelError | None = None
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(
        cls, endpoint: ReplicaEndpoint, silence_s: float = SILENCE_S, on_leaving: Callable[[], None] = lambda: None
    ) -> Self:
        """Connect; raises a ChannelError when the replica is not there.

        ``silence_s`` without a word loses it. ``on_leaving`` is called when it begins to drain, and when it is lost.
        """
        channel = await Channel.connect(endpoint.address, endpoint.secret)
        await channel.send(Opened(role="gateway"))
        return cls(endpoint, channel, silence_s, on_leaving)

    @property
    def is_lost(self) -> bool:
        """Whether the connection is broken for good."""
        return self._lost is not None

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._inboxes)

    def note_draining(self) -> None:
        """The replica said that it is leaving; it is not chosen any more unless its next load says otherwise."""
        self.load = msgspec.structs.replace(self.load, draining=True)

    def offer_leave(self) -> None:
        """Let every open request ask whether it may leave; the replica drains, or another one has come."""
        for inbox in self._inboxes.values():
            inbox.put(None)

    async def replies(
        self, request: Request, may_leave: Callable[[], bool] = lambda: False
    ) -> AsyncGenerator[tuple[Reply, list[bytes]]]:
        """Send ``request`` and yield what comes back for it, with buffers, until the caller stops.

        Raises RequestRefused when the replica refuses, ReplicaLostError when the connection breaks, ReplicaLeaving
        when the replica drains and ``may_leave``. Leaving early tells the replica to cancel.
        """
        if self._lost is not None:
            raise ReplicaLostError(str(self._lost))
        inbox = self._inboxes[request.request_id] = _Inbox()
        ended = False
        try:
            self._channel.send_nowait(request)
            while True:
                for arrival in await inbox.take():
                    if arrival is None:
                        if may_leave():
                            raise ReplicaLeaving
                        continue
                    ended = _is_last(arrival)
                    yield self._checked(arrival)
                    if ended:
                        return  # what arrived with it, as the end of the connection, is of no concern
        except ChannelError as error:
            ended = True
            raise ReplicaLostError(f"replica {self.replica_id}: {error}") from error
        finally:
            del self._inboxes[request.request_id]
            if not ended and self._lost is None:
                self._cancel(request.request_id)

    def _checked(self, arrival: tuple[Reply, list[bytes]] | ChannelError) -> tuple[Reply, list[bytes]]:
        if isinstance(arrival, ChannelError):
            raise ReplicaLostError(f"replica {self.replica_id}: {arrival}") from arrival
        if isinstance(arrival[0], Refused):
            raise RequestRefused(arrival[0])
        return arrival

    def _cancel(self, request_id: str) -> None:
        try:
            self._channel.send_nowait(Cancel(request_id=request_id))
        except ChannelClosed:
            return  # a lost replica has nothing left to cancel

    async def _read(self) -> None:
        try:
            while True:
                message, buffers = await self._channel.receive(self._silence_s)
                if isinstance(message, Load):
                    begins_to_drain = message.draining and not self.load.draining
                    self.load = message
                    if begins_to_drain:
                        self.offer_leave()
                        self._on_leaving()
                elif isinstance(message, Replies):
                    for reply in message.replies:
                        self._deliver(reply, [])
                elif isinstance(message, Reply):
                    self._deliver(message, buffers)
                else:
                    raise ChannelClosed(f"it sent a {type(message).__name__}")
        except ChannelError as error:
            self._lost = error
            self._channel.close()
            self._on_leaving()
            for inbox in self._inboxes.values():
                inbox.put(error)

    def _deliver(self, reply: Reply, buffers: list[bytes]) -> None:
        inbox = self._inboxes.get(reply.request_id)
        if inbox is not None:  # else the request was cancelled while this was on its way
            inbox.put((reply, buffers))

    async def close(self) -> None:
        """Close; open requests end with ReplicaLostError."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._channel.close()
        self._lost = self._lost or ChannelClosed("the gateway closed the connection")
        for inbox in self._inboxes.values():
            inbox.put(self._lost)


_MORE_FOLLOWS = (Started, Delta)


def _is_last(arrival: tuple[Reply, list[bytes]] | ChannelError) -> bool:
    return isinstance(arrival, ChannelError) or not isinstance(arrival[0], _MORE_FOLLOWS)
