"""The HTTP server itself: what it refuses before there is a request, slow clients, draining, and taking over."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.control.ports import unused_ports
from cluster.errors import ControlError
from deployments.gateway import body, protocol, sharing
from deployments.gateway.app import create_app
from deployments.gateway.closing import Closing
from deployments.gateway.server import HttpServer
from deployments.gateway.sharing import SharedSocket, open_shared
from tests.support.drops import PATH, connect_and_drop, footprint, post, settle
from tests.support.fake_backend import FakeBackend
from tests.support.gateway_server import listen, read_response_head, serving

BODY = {"model": "writer", "prompt": "hi"}


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and JSON of a response."""
    status, headers = await read_response_head(reader)
    return status, headers, json.loads(await reader.readexactly(int(headers["content-length"])))


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a gateway, nothing sent yet."""
    async with serving(create_app(FakeBackend())) as address:
        reader, writer = await asyncio.open_connection(*address)
        try:
            yield reader, writer
        finally:
            writer.close()


async def test_responses_carry_a_date_and_connections_are_kept() -> None:
    async with connected() as (reader, writer):
        for _ in range(3):
            writer.write(post(BODY))
            status, headers, _ = await answer(reader)
            assert status == 200
            assert headers["date"].endswith("gmt")
            assert "connection" not in headers
            assert "server" not in headers


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"hello?\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * protocol.MAX_HEAD_BYTES, 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * protocol.MAX_HEAD_BYTES + b"\r\n\r\n", 431, "head_too_large"),
        (b"GET /" + b"y" * protocol.MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "head_too_large"),
    ],
)
async def test_what_is_no_request_is_refused_in_openais_shape_and_the_connection_closed(
    raw: bytes, status: int, code: str
) -> None:
    async with connected() as (reader, writer):
        writer.write(raw)
        refused = await answer(reader)
        assert (refused[0], refused[2]["error"]["code"]) == (status, code)
        assert refused[1]["connection"] == "close"
        assert await reader.read() == b""


async def test_a_head_that_does_not_end_is_answered_and_a_silent_connection_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.05)
    async with connected() as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost:")
        refused = await answer(reader)
        assert (refused[0], refused[2]["error"]["code"]) == (408, "client_too_slow")
        assert await reader.read() == b""
    async with connected() as (reader, _):
        assert await reader.read() == b""


async def test_a_second_head_that_does_not_end_is_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.05)
    async with connected() as (reader, writer):
        writer.write(post(BODY))
        assert (await answer(reader))[0] == 200
        writer.write(b"GET /")
        assert (await answer(reader))[0] == 408


async def test_an_upload_that_stops_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "UPLOAD_STALL_S", 0.05)
    async with connected() as (reader, writer):
        writer.write(post(BODY)[:-5])
        refused = await answer(reader)
    assert (refused[0], refused[2]["error"]["code"]) == (408, "client_too_slow")


async def test_a_client_that_does_not_read_loses_its_request_and_the_gateway_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "deployments")
    monkeypatch.setattr(protocol, "STALL_TIMEOUT_S", 0.1)
    backend = FakeBackend()
    backend.replace_settings(max_streams=1)
    async with serving(create_app(backend), listen(send_buffer_bytes=4096)) as address:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address)
        client.sendall(post(BODY | {"stream": True, "max_tokens": 500, "n": 8, "ignore_eos": True}))
        await backend.wait_for(lambda: bool(backend.cancelled) and backend.num_open == 0)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(post(BODY))
        assert (await answer(reader))[0] == 200, "its permit has come back"
        writer.close()
        client.close()
    assert f"{PATH}: 408" in caplog.text


async def test_draining_ends_streams_in_good_order_and_keeps_connections_usable_until_then() -> None:
    backend, closing = FakeBackend(), Closing()
    backend.pause_after = 3
    app = create_app(backend, closing=closing)
    http = HttpServer(app, closing)
    listening = listen()
    address = listening.getsockname()
    http.start(listening)
    streaming, stream_writer = await asyncio.open_connection(*address)
    stream_writer.write(post(BODY | {"stream": True, "seed": 1}))
    await read_response_head(streaming)
    idle, idle_writer = await asyncio.open_connection(*address)
    idle_writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await answer(idle))[0] == 200

    draining = asyncio.create_task(http.drain(30.0))
    await asyncio.sleep(0)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address)
    idle_writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    status, headers, _ = await answer(idle)
    assert (status, headers["connection"]) == (503, "close")
    assert await idle.read() == b""
    assert not draining.done()
    backend.resume.set()
    assert b"data: [DONE]" in await streaming.readuntil(b"0\r\n\r\n")
    stream_writer.close()
    await draining
    idle_writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_not_done_when_the_drain_timeout_ends_ends_with_an_error(stream: bool) -> None:
    backend, closing = FakeBackend(), Closing()
    backend.pause_after = 3
    http = HttpServer(create_app(backend, closing=closing), closing)
    listening = listen()
    address = listening.getsockname()
    http.start(listening)
    reader, writer = await asyncio.open_connection(*address)
    writer.write(post(BODY | {"stream": stream}))
    await backend.wait_for(lambda: backend.num_open == 1)
    draining = asyncio.create_task(http.drain(0.05))
    raw = await reader.read()
    assert b'"code":"draining"' in raw
    assert raw.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 503")
    assert b"[DONE]" not in raw
    writer.close()
    await draining
    assert backend.num_open == 0


async def test_idle_connections_are_closed_soon_when_the_process_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CLOSING_IDLE_S", 0.05)
    closing = Closing()
    http = HttpServer(create_app(FakeBackend(), closing=closing), closing)
    listening = listen()
    address = listening.getsockname()
    http.start(listening)
    used, used_writer = await asyncio.open_connection(*address)
    used_writer.write(post(BODY))
    await answer(used)
    unused, unused_writer = await asyncio.open_connection(*address)
    await http.drain(30.0)
    assert await used.read() == b""
    assert await unused.read() == b""
    used_writer.close()
    unused_writer.close()


def serve_shared(shared: SharedSocket, app: Any, closing: Closing) -> HttpServer:
    """A server on a shared socket that hands it over to whoever asks."""
    asyncio.get_running_loop().add_reader(shared.hand_over, shared.give)
    return HttpServer(app, closing)


async def leave(shared: SharedSocket, http: HttpServer) -> None:
    asyncio.get_running_loop().remove_reader(shared.hand_over)
    shared.close()
    await http.drain(30.0)


async def test_a_new_gateway_takes_over_and_no_connection_is_refused_or_reset() -> None:
    (port,) = unused_ports(1)
    done = False
    statuses: list[int] = []

    async def ask_on_new_connections() -> None:
        while not done:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(BODY, "Connection: close"))
            statuses.append((await answer(reader))[0])
            writer.close()

    async def start() -> tuple[SharedSocket, HttpServer]:
        closing = Closing()
        shared = await asyncio.to_thread(open_shared, "127.0.0.1", port, "test")
        http = serve_shared(shared, create_app(FakeBackend(), closing=closing), closing)
        http.start(shared.listening)
        return shared, http

    current = await start()
    clients = [asyncio.create_task(ask_on_new_connections()) for _ in range(4)]
    for _ in range(10):
        new = await start()
        await leave(*current)
        current, enough = new, len(statuses) + 8
        while len(statuses) < enough:
            assert not any(client.done() for client in clients)
            await asyncio.sleep(0)
    done = True
    await asyncio.gather(*clients)
    await leave(*current)
    assert set(statuses) == {200}
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


def test_a_port_of_a_stranger_is_refused_with_its_name_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_TAKEN_AFTER_S", 0.1)
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        expected = rf"gateway.http: port {port} on 127.0.0.1 is taken by process {os.getpid()} .*write another port"
        with pytest.raises(ControlError, match=expected):
            open_shared("127.0.0.1", port, "test")


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ControlError, match=r"nothing can listen on port 80 of 192\.0\.2\.1 here"):
        open_shared("192.0.2.1", 80, "test")


def test_gateways_of_another_cluster_do_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_TAKEN_AFTER_S", 0.1)
    (port,) = unused_ports(1)
    ours = open_shared("127.0.0.1", port, "ours")
    try:
        with pytest.raises(ControlError, match="is taken by"):
            open_shared("127.0.0.1", port, "theirs")
    finally:
        ours.close()
        ours.listening.close()


def test_what_a_killed_gateway_left_is_no_obstacle() -> None:
    (port,) = unused_ports(1)
    program = (
        "import os, signal; from deployments.gateway.sharing import open_shared; "
        f"kept = open_shared('127.0.0.1', {port}, 'test'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    shared = open_shared("127.0.0.1", port, "test")
    shared.close()
    shared.listening.close()


async def test_clients_that_come_and_go_leave_nothing_behind() -> None:
    backend = FakeBackend()
    backend.pause_after = 2
    async with serving(create_app(backend)) as address:
        before = footprint()
        await connect_and_drop(address, backend, range(100))
        await settle(before)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await answer(reader))[2]["num_requests"] == 0
        writer.close()


async def test_a_client_that_leaves_while_all_places_are_taken_was_refused_already() -> None:
    backend = FakeBackend()
    backend.replace_settings(max_streams=1)
    backend.pause_after = 0
    async with serving(create_app(backend)) as address:
        _, holding = await asyncio.open_connection(*address)
        holding.write(post(BODY))
        await backend.wait_for(lambda: backend.num_open == 1)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(post(BODY))
        assert (await answer(reader))[0] == 429
        writer.close()
        holding.close()
        await backend.wait_for(lambda: backend.num_open == 0)
