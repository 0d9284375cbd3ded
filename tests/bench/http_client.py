"""A client that costs almost nothing: a request's bytes go out on a raw socket, what comes back is only time-stamped.

The response is read (HTTP, chunks, server-sent events, JSON) after the measurement; client and server share the
machine, so every cycle spent here would be taken from the server.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from tests.bench.closed_loop import Exchange
from tests.bench.figures import Record

_LAST_CHUNK = b"0\r\n\r\n"


class _Connection(asyncio.Protocol):
    """Sends one request and stamps what comes, until the server closes it or has sent its last chunk."""

    def __init__(self, request: bytes, exchange: Exchange) -> None:
        self._request = request
        self._exchange = exchange
        self._transport: asyncio.Transport | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._exchange.arrivals.append((time.perf_counter(), data))
        if data.endswith(_LAST_CHUNK) and self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionsServer:
    """A :class:`~tests.bench.closed_loop.Source`: ``/v1/completions`` of a server, greedy, never ending by itself."""

    url: str
    model: str

    async def stream(self, prompt: str, max_tokens: int, exchange: Exchange) -> None:
        """One request on a connection of its own."""
        where = urlsplit(self.url)
        request = _request(where.netloc, self._body(prompt, max_tokens))
        transport = connection = None
        try:
            transport, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(request, exchange), where.hostname, where.port
            )
            await asyncio.shield(connection.done)
        except OSError as error:
            exchange.failure = f"{type(error).__name__}: {error}"
        finally:
            if transport is not None and connection is not None:
                transport.abort()
                await connection.done

    def _body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def read(self, exchange: Exchange) -> Record:
        """The record of what came."""
        record = Record(sent_s=exchange.sent_s, error=exchange.failure)
        head, separator, _ = b"".join(data for _, data in exchange.arrivals).partition(b"\r\n\r\n")
        if separator and head.split(b" ", 2)[1] != b"200":
            everything = b"".join(data for _, data in exchange.arrivals)
            record.error = everything[:400].decode(errors="replace")
        if record.error is None:
            _read_events(exchange, record)
        return record


def _request(host: str, body: dict[str, Any]) -> bytes:
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + payload


def _read_events(exchange: Exchange, record: Record) -> None:
    ended = False
    for at, event in events(exchange.arrivals):
        if event == "[DONE]":
            ended = True
            continue
        message = json.loads(event)
        if message.get("error"):
            record.error = str(message["error"])[:400]
            return
        if any(choice.get("text") for choice in message.get("choices") or ()):
            record.event_times.append(at)
        if usage := message.get("usage"):
            record.num_tokens, record.num_prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
    if not ended:
        record.num_tokens = None  # cut off, or still under way
    elif not record.event_times:
        record.error = "the stream ended without any text"


def events(arrivals: list[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    """The data of each server-sent event that is complete, and when its last byte came."""
    body = b""
    for at, data in _dechunked(arrivals):
        body = (body + data).replace(b"\r\n", b"\n")
        *complete, body = body.split(b"\n\n")
        for event in complete:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield at, line[5:].strip().decode()


def _dechunked(arrivals: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The response's body as it came, without head and chunk sizes; a body that is not chunked passes as it is."""
    pending, in_body, chunked = b"", False, False
    left = 0  # bytes of the current chunk still to come, with the line end after it
    for at, data in arrivals:
        pending += data
        if not in_body:
            head, separator, rest = pending.partition(b"\r\n\r\n")
            if not separator:
                continue
            in_body, chunked, pending = True, b"transfer-encoding: chunked" in head.lower(), rest
        if not chunked:
            yield at, pending
            pending = b""
            continue
        while pending:
            if left == 0:
                size, separator, rest = pending.partition(b"\r\n")
                if not separator:
                    break
                left, pending = int(size.split(b";")[0], 16) + 2, rest
            part, pending = pending[:left], pending[left:]
            left -= len(part)
            # the last two bytes of a chunk are its line end, wherever the arrivals were cut
            keep = len(part) - max(0, 2 - left) if left < 2 else len(part)
            if keep > 0:
                yield at, part[:keep]
