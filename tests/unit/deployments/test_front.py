"""One gateway process: its port opens with its first table and closes when its streams have ended."""

import asyncio
import json

import pytest

from cluster.control.ports import unused_ports
from deployments.front import Front
from deployments.gateway.telemetry import NoTelemetry
from deployments.gateway.thread import LoopThread
from tests.support.drops import post
from tests.support.fake_cluster import FakeCluster, table
from tests.support.gateway_server import read_response_head
from tests.support.speaking_service import SpeakingService


async def ask(port: int, model: str) -> tuple[int, dict]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(post({"model": model, "prompt": "hi"}))
    status, headers = await read_response_head(reader)
    body = json.loads(await reader.readexactly(int(headers["content-length"])))
    writer.close()
    return status, body


async def test_a_gateway_in_a_thread_of_its_own_from_its_first_table_to_its_last_stream() -> None:
    cluster, thread = FakeCluster(), LoopThread("test")
    slow = SpeakingService("hello", hold_after=3)
    await cluster.add("m-v1", "slow", slow)
    (port,) = unused_ports(1)
    front = await thread.run(Front.create(cluster.open_pool, NoTelemetry()))
    with pytest.raises(ConnectionRefusedError):
        await ask(port, "m")
    await thread.run(front.route(table(m=[("m-v1", 1.0)])))
    for _ in range(2):
        await thread.run(front.listen("127.0.0.1", port, "test"))
    assert (await ask(port, "nobody"))[0] == 404
    asking = asyncio.create_task(ask(port, "m"))
    async with asyncio.timeout(10):
        while not slow.seen:
            await asyncio.sleep(0)
    assert await thread.run(front.pulse()) >= 1
    closing = asyncio.create_task(thread.run(front.close(30.0)))
    slow.released.set()
    status, body = await asking
    assert (status, body["choices"][0]["text"]) == (200, "hello")
    await closing
    with pytest.raises(ConnectionRefusedError):
        await ask(port, "m")
    await thread.stop()
    await cluster.stop()
