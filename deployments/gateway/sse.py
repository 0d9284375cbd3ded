"""Merged streams in, a text/event-stream response out: sent the moment it arrives, ended at once with its client."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.gateway.answers import Usage
from deployments.gateway.call import Call
from deployments.gateway.chunks import DONE, HEARTBEAT, error_event
from deployments.gateway.errors import ClientGone
from deployments.gateway.merge import Batch, MergedStreams

HEARTBEAT_S = 10.0
ERROR_SEND_TIMEOUT_S = 5.0

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

AnyResult = TypeVar("AnyResult")


async def while_connected(work: Coroutine[Any, Any, AnyResult], receive: Receive) -> AnyResult:
    """The result of ``work``; cancels it and raises ClientGone as soon as the client closes the connection.

    ``receive`` must have delivered the whole request body. Returns only when ``work`` has cleaned up.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGone from watcher.exception()
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventEncoder(Protocol):
    """Turns batches of deltas into events."""

    def encode(self, batch: Batch) -> bytes:
        """Events of a batch; may be none."""

    def usage(self, usage: Usage) -> bytes:
        """The event that tells what the request has used."""


class StreamingAnswer(Response):
    """Sends the events of one request.

    A failure before the first event is raised, so that it still becomes an HTTP status; after it, it is sent as an
    ``error`` event and the stream ends without ``[DONE]``. Comments keep the connection alive while nothing comes;
    from the first comment on the status is out.
    """

    def __init__(self, streams: MergedStreams, encoder: EventEncoder, call: Call, *, include_usage: bool) -> None:
        super().__init__()
        self._streams = streams
        self._encoder = encoder
        self._call = call
        self._include_usage = include_usage
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send everything; raises ClientGone when the client leaves first."""
        await while_connected(self._send(send), receive)

    async def _send(self, send: Send) -> None:
        try:
            async with self._call.limit(), self._streams:
                await self._send_deltas(send)
                last = self._encoder.usage(self._streams.usage) if self._include_usage else b""
                await self._write(send, last + DONE)
        except Exception as error:
            if not self._begun:
                raise
            failure = self._call.fail(error)
            async with asyncio.timeout(ERROR_SEND_TIMEOUT_S):
                await self._write(send, error_event(failure))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_deltas(self, send: Send) -> None:
        async for batch in self._streams:
            body = self._encoder.encode(batch) if batch else HEARTBEAT
            if body:
                await self._write(send, body)

    async def _write(self, send: Send, body: bytes) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": body, "more_body": True})
