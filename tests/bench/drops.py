"""``python -m tests.bench drops``: connect-and-drop cycles against the gateway, and what they leave behind.

The same cycles as in the unit tests, only as many as asked for; gateway and clients share this process, so the memory
is that of both. Ends with an error when a descriptor, a task or a permit is left.
"""

import argparse
import asyncio
import json

import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from deployments.gateway.app import create_app
from tests.support.drops import connect_and_drop, footprint, settle
from tests.support.fake_backend import FakeBackend
from tests.support.gateway_server import read_response_head, serving

PARTS = 5


async def drop(num_cycles: int) -> Table:
    """A row for every fifth of the cycles."""
    table = Table("cycles", "descriptors", "tasks", "requests in flight", "memory MB")
    backend = FakeBackend()
    backend.pause_after = 2
    async with serving(create_app(backend)) as address:
        before = footprint()
        for part in range(PARTS):
            cycles = range(part * num_cycles // PARTS, (part + 1) * num_cycles // PARTS)
            await connect_and_drop(address, backend, cycles)
            await settle(before)
            memory = psutil.Process().memory_info().rss / 1e6
            in_flight = await num_requests(address)
            assert in_flight == 0, f"{in_flight} permits are held by nobody"
            table.add_row(str(cycles.stop), *map(str, before), str(in_flight), f"{memory:.1f}")
            backend.requests.clear()
            backend.cancelled.clear()
            await settle(before)
    return table


async def num_requests(address: tuple[str, int]) -> int:
    """What ``/health`` says is in flight."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    _, headers = await read_response_head(reader)
    answer = json.loads(await reader.readexactly(int(headers["content-length"])))
    writer.close()
    return int(answer["num_requests"])


def main() -> None:
    """Drop, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=10_000)
    Console().print(uvloop.run(drop(parser.parse_args().cycles)))


if __name__ == "__main__":
    main()
