"""The gateway over a fake backend on a real loopback socket, in the test's own event loop."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from deployments.gateway.closing import Closing
from deployments.gateway.server import HttpServer


def listen(*, send_buffer_bytes: int | None = None) -> socket.socket:
    """A listening socket on a free port of 127.0.0.1; accepted connections inherit the size of its send buffer."""
    listening = socket.socket()
    if send_buffer_bytes is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    listening.setblocking(False)
    return listening


@asynccontextmanager
async def serving(
    app: FastAPI, listening: socket.socket | None = None, closing: Closing | None = None
) -> AsyncIterator[tuple[str, int]]:
    """Serve ``app`` while the block runs; yields host and port, which accept connections at once."""
    listening = listen() if listening is None else listening
    host, port = listening.getsockname()
    server = HttpServer(app, Closing() if closing is None else closing)
    server.start(listening)
    try:
        yield host, port
    finally:
        await server.stop()


async def read_response_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of a raw HTTP response."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status_line, *lines = head.rstrip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status_line.split()[1]), headers
