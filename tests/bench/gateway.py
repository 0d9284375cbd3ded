"""``python -m tests.bench.gateway``: CPU time of one streamed token on its way to the client.

Three processes, as in reality: a replica (session and channel around an engine that only keeps time), a gateway
(HTTP, router, channel), and this one, a client that reads raw sockets. Printed are microseconds of process CPU time
per token, which a busy machine changes much less than it changes any latency, and the median time to the first token.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from numpy import float32
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cluster.plan.types import RoutingTable
from deployments.channel import Channel, Listener
from deployments.gateway.app import create_app
from deployments.messages import (
    Delta,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    Finished,
    Generate,
    Load,
    Started,
    Tokenize,
    Tokenized,
)
from deployments.replica.session import GatewaySession
from deployments.router.connection import ReplicaEndpoint
from deployments.router.pool import ReplicaPool
from deployments.router.router import Router
from tests.support.fake_backend import SETTINGS, route
from tests.support.gateway_server import serving

SECRET = b"x" * 32
MODEL = "writer"


class MetronomeService:
    """Every ``step_s`` one token for each open request, all in one turn of the loop, as an engine brings them."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._open: dict[str, tuple[asyncio.Queue[Delta], int]] = {}
        self._task = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        at = time.monotonic()
        while True:
            at += self._step_s
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            for request_id, (queue, index) in self._open.items():
                queue.put_nowait(Delta(request_id=request_id, index=0, text=" word", token_ids=(index,)))

    async def generate(self, request: Generate) -> AsyncGenerator[Started | Delta | Finished]:
        """``max_tokens`` words."""
        assert request.max_tokens is not None
        queue: asyncio.Queue[Delta] = asyncio.Queue()
        self._open[request.request_id] = (queue, 7)
        try:
            yield Started(request_id=request.request_id, num_prompt_tokens=1, num_cached_tokens=0, seed=1)
            for _ in range(request.max_tokens):
                yield await queue.get()
        finally:
            del self._open[request.request_id]
        yield Finished(
            request_id=request.request_id,
            num_prompt_tokens=1,
            num_cached_tokens=0,
            num_completion_tokens=request.max_tokens,
        )

    async def embed(self, request: Embed) -> tuple[Embedded, NDArray[float32]]:
        """Not measured."""
        raise NotImplementedError

    def tokenize(self, request: Tokenize) -> Tokenized:
        """Not measured."""
        raise NotImplementedError

    def detokenize(self, request: Detokenize) -> Detokenized:
        """Not measured."""
        raise NotImplementedError

    def load(self) -> Load:
        """Never busy."""
        return Load(
            num_running=len(self._open), num_waiting=0, num_waiting_tokens=0, kv_used_fraction=0.0, draining=False
        )


async def replica(step_s: float, say: Connection) -> None:
    """Serve gateways for ever."""
    service = MetronomeService(step_s)

    async def converse(channel: Channel) -> None:
        await GatewaySession(channel, service).run()

    say.send(await Listener(converse, SECRET).start("127.0.0.1"))
    await asyncio.Event().wait()


async def gateway(address: str, say: Connection) -> None:
    """Serve HTTP for ever."""

    async def discover() -> list[ReplicaEndpoint]:
        return [ReplicaEndpoint(replica_id="r", address=address, secret=SECRET)]

    async def wake() -> ReplicaEndpoint:
        return (await discover())[0]

    settings = SETTINGS.model_copy(update={"max_streams": 1000})
    table = RoutingTable(settings=settings, routes=(route(MODEL),))
    router = Router(table, lambda app: ReplicaPool(app, discover, wake))
    async with serving(create_app(router)) as (host, port):
        say.send((host, port))
        await asyncio.Event().wait()


def run_process(work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    """Entry of a child process: a new event loop, the fastest there is."""
    import uvloop

    uvloop.run(work(*arguments))


def start(work: Callable[..., Awaitable[None]], *arguments: Any) -> tuple[multiprocessing.Process, Any]:
    """A child process, and the first thing it said."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=run_process, args=(work, *arguments, there), daemon=True)
    process.start()
    return process, here.recv()


@dataclass(slots=True)
class Seen:
    """What the client counted."""

    num_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)


async def stream(host: str, port: int, max_tokens: int, seen: Seen) -> None:
    """One streamed chat completion over a socket of its own."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": max_tokens, "stream": True}
    raw = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(host, port)
    begin = time.perf_counter()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    tail = b""
    first = True
    while b"[DONE]" not in tail:
        data = await reader.read(65536)
        assert data, "the gateway closed the connection"
        count = data.count(b'"content":')
        if first and count:
            first = False
            seen.first_token_s.append(time.perf_counter() - begin)
        seen.num_tokens += count
        tail = (tail + data)[-64:]
    writer.close()


def cpu_s(process_id: int) -> float:
    """CPU time that a process has used, by its own clock; the counters in /proc are sampled by ticks."""
    return time.clock_gettime((~process_id << 3) | 2)  # Linux's clock id of another process


async def measure(num_streams: int, step_s: float, seconds: float) -> dict[str, float]:
    """Microseconds per token of each process, and the median time to the first token in milliseconds."""
    replica_process, address = start(replica, step_s)
    gateway_process, (host, port) = start(gateway, address)
    assert replica_process.pid is not None
    assert gateway_process.pid is not None
    processes = {"replica": replica_process.pid, "gateway": gateway_process.pid}
    try:
        await asyncio.gather(*(stream(host, port, 10, Seen()) for _ in range(num_streams)))
        seen = Seen()
        before = {name: cpu_s(process) for name, process in processes.items()}
        num_tokens = max(1, int(seconds / step_s))
        await asyncio.gather(*(stream(host, port, num_tokens, seen) for _ in range(num_streams)))
        used = {name: (cpu_s(process) - before[name]) / seen.num_tokens * 1e6 for name, process in processes.items()}
    finally:
        for child in (gateway_process, replica_process):
            child.kill()
            child.join()
    return used | {"first_ms": statistics.median(seen.first_token_s) * 1e3, "tokens": float(seen.num_tokens)}


def main() -> None:
    """Measure at every number of streams, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    arguments = parser.parse_args()
    table = Table("streams", "tokens/s", "gateway us/token", "replica us/token", "sum", "TTFT p50 ms")
    for num_streams in arguments.streams:
        found = asyncio.run(measure(num_streams, arguments.step_ms / 1e3, arguments.seconds))
        row = (found["tokens"] / arguments.seconds, found["gateway"], found["replica"])
        table.add_row(
            str(num_streams), *(f"{value:.0f}" for value in (*row, row[1] + row[2])), f"{found['first_ms']:.1f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
