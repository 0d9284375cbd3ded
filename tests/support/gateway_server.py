"""The gateway over a fake backend on a real loopback socket, in the test's own event loop."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[tuple[str, int]]:
    """Serve ``app`` on 127.0.0.1 while the block runs; yields host and port, which accept connections at once."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    config = uvicorn.Config(app, lifespan="off", ws="none", log_level="error", access_log=False)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[listener])
    try:
        host, port = listener.getsockname()
        yield host, port
    finally:
        for accepting in server.servers:
            accepting.close()
        for connection in tuple(server.server_state.connections):
            connection.transport.close()
        await asyncio.gather(*server.server_state.tasks)


async def read_response_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of a raw HTTP response."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status_line, *lines = head.rstrip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status_line.split()[1]), headers
