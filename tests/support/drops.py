"""Clients that connect, ask and drop the connection at some point, one after another; what they leave behind."""

import asyncio
import gc
import json
import os

from tests.support.fake_backend import FakeBackend
from tests.support.gateway_server import read_response_head

PATH = "/v1/completions"


async def connect_and_drop(address: tuple[str, int], backend: FakeBackend, cycles: range) -> None:
    """Drop in the middle of the upload, while the model works, or between two events of a stream, in turn.

    ``backend`` pauses after some tokens, so that no request ends by itself. Returns when all are cancelled.
    """
    for cycle in cycles:
        reader, writer = await asyncio.open_connection(*address)
        streams = bool(cycle % 2)
        request = post({"model": "writer", "prompt": "hi", "stream": streams, "n": 1 + cycle % 3})
        if cycle % 5 == 0:
            writer.write(request[:-3])
        else:
            writer.write(request)
            if streams:
                await read_response_head(reader)
            else:
                await backend.wait_for(lambda: backend.num_open == 1)
        writer.close()
        await backend.wait_for(lambda: backend.num_open == 0)


def post(body: dict[str, object], *headers: str) -> bytes:
    """A raw request for a completion."""
    raw = json.dumps(body).encode()
    lines = [f"POST {PATH} HTTP/1.1", "Host: x", f"Content-Length: {len(raw)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + raw


def footprint() -> tuple[int, int]:
    """Open descriptors and living tasks of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())


async def settle(before: tuple[int, int]) -> None:
    """Wait until the footprint is what it was; TimeoutError when it never is."""
    async with asyncio.timeout(20):
        while footprint() != before:
            await asyncio.sleep(0.02)  # collecting takes a while itself where torch is loaded
