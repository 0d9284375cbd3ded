"""Gateways that break one promise each, for drills to find out: real HTTP over a faulty fake backend."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil

from cluster.control.drill.client import Client
from deployments.gateway.app import create_app
from deployments.gateway.backend import Event
from deployments.messages import ChatPrompt, Delta, Generate, Refused, RequestRefused
from tests.support.fake_backend import SETTINGS, FakeBackend
from tests.support.gateway_server import serving


class FaultyBackend(FakeBackend):
    """Healthy until ``fault`` names what it does wrong: repeat, drop, hang, fail, refuse_slowly, no_chat."""

    def __init__(self) -> None:
        super().__init__(SETTINGS.model_copy(update={"max_streams": 100}))
        self.fault: str | None = None

    async def generate(self, model: str, request: Generate) -> AsyncGenerator[Event]:
        """The events of the fake engine, with the fault in them."""
        if self.fault == "refuse_slowly":
            await asyncio.sleep(0.15)
            raise RequestRefused(Refused(request_id="", code="overloaded", message="full", retry_after_s=2.0))
        if self.fault == "no_chat" and isinstance(request.prompt, ChatPrompt):
            raise RequestRefused(Refused(request_id="", code="unsupported", message="no chat template"))
        number = 0
        events = super().generate(model, request)
        try:
            async for event in events:
                number += isinstance(event, Delta)
                async for told in self._told(event, at_fault=isinstance(event, Delta) and number == 3):
                    yield told
        finally:
            await events.aclose()

    async def _told(self, event: Event, *, at_fault: bool) -> AsyncGenerator[Event]:
        if at_fault and self.fault == "hang":
            await asyncio.Event().wait()
        if at_fault and self.fault == "fail":
            raise RequestRefused(Refused(request_id="", code="internal", message="stage 1 is lost"))
        if not (at_fault and self.fault == "drop"):
            yield event
        if at_fault and self.fault == "repeat":
            yield event


@asynccontextmanager
async def faulty_gateway() -> AsyncIterator[tuple[FaultyBackend, Client, str]]:
    """A healthy gateway that can be made faulty, a client of it, and its address."""
    backend = FaultyBackend()
    async with serving(create_app(backend)) as (host, port):
        url = f"http://{host}:{port}"
        async with Client(url) as client:
            yield backend, client, url


@asynccontextmanager
async def answering(response: bytes) -> AsyncIterator[Client]:
    """A server that answers every request with these bytes and closes the connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        writer.write(response)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        async with Client(f"http://{host}:{port}") as client:
            yield client
    finally:
        server.close()
        await server.wait_closed()


def event_stream(*events: str, length: int | None = None) -> bytes:
    """A whole HTTP response of server-sent events; ``length`` is what its header promises, if not the truth."""
    body = "".join(f"data: {event}\n\n" for event in events).encode()
    head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n"
    return f"{head}content-length: {length or len(body)}\r\n\r\n".encode() + body


class Victim:
    """Stands for a process in the hands of a drill."""

    def __init__(self, pid: int) -> None:
        self.pid = pid


class OneReplicaSite:
    """A site whose one replica is a fake backend; remembers what was done to it."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.model = "writer"
        self.arguments_found = {"dtype": "float32", "context_tokens": 512, "max_running": 8, "max_waiting": 8}
        self.left_over: list[str] = []
        self.calls: list[str] = []
        self.error: Exception | None = None

    def require_settled(self) -> None:
        """Always."""

    def arguments(self) -> dict[str, Any]:
        """What the model was started with."""
        return self.arguments_found

    def replicas(self) -> tuple[Any, ...]:
        """One."""
        from cluster.control.observe import ReplicaStatus

        known = {"node": "127.0.0.1", "pid": 1, "resident_bytes": 0, "log_file": None, "node_id": "n", "stages": ()}
        return (ReplicaStatus(id="a", state="RUNNING", **known),)

    def replica_process(self, replica: Any) -> psutil.Process:
        """The test's own process."""
        return psutil.Process()

    def gateway_process(self) -> psutil.Process:
        """The test's own process, which is the gateway."""
        return psutil.Process()

    def leftovers(self) -> list[str]:
        """What ``left_over`` says."""
        return self.left_over

    def change(self, change: Any, report: Any) -> None:
        """Note it, or raise ``error``."""
        self.calls.append("change")
        if self.error is not None:
            raise self.error

    def restore(self, report: Any) -> None:
        """Note it."""
        self.calls.append("restore")
