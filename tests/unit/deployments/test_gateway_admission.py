"""Who may come in and for how long: body limit, permits, deadlines, request ids, health, what is measured."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from deployments.gateway.admission import retry_after_s
from deployments.gateway.app import create_app
from tests.support.fake_backend import SETTINGS, FakeBackend
from tests.support.gateway_client import in_process
from tests.support.gateway_server import read_response_head, serving

BODY = {"model": "writer", "prompt": "hi"}
PATH = "/v1/completions"


class Recorder:
    """Telemetry that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def started(self, **facts: Any) -> None:
        self.seen.append(("started", facts))

    def first_token(self, **facts: Any) -> None:
        self.seen.append(("first_token", facts))

    def finished(self, **facts: Any) -> None:
        self.seen.append(("finished", facts))

    def refused(self, **facts: Any) -> None:
        self.seen.append(("refused", facts))

    @property
    def names(self) -> list[str]:
        """What happened, in order."""
        return [name for name, _ in self.seen]


async def test_a_client_that_leaves_during_its_upload_is_no_failure_of_the_server() -> None:
    recorder = Recorder()
    async with serving(create_app(FakeBackend(), recorder)) as (host, port):
        _, writer = await asyncio.open_connection(host, port)
        writer.write(f'POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\n{{"model":'.encode())
        while "started" not in recorder.names:
            await asyncio.sleep(0.01)
        writer.close()
        while len(recorder.seen) < 2:
            await asyncio.sleep(0.01)
    assert recorder.seen[1][0] == "finished"
    assert recorder.seen[1][1]["status"] == 499


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_of_ten_megabytes_is_refused_over_a_socket(announced: bool) -> None:
    body = json.dumps(BODY | {"prompt": "x" * 10_000_000}).encode()
    async with serving(create_app(FakeBackend())) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        head = f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\n"
        if announced:
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        else:
            writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for start in range(0, len(body), 65536):
                piece = body[start : start + 65536]
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            writer.write(b"0\r\n\r\n")
        status, headers = await read_response_head(reader)
        answer = json.loads(await reader.readexactly(int(headers["content-length"])))
        writer.close()
    assert status == 413
    assert answer["error"]["code"] == "body_too_large"
    assert str(SETTINGS.max_body_bytes) in answer["error"]["message"]


async def test_the_body_limit_counts_bytes_not_promises() -> None:
    received = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal received
        while True:
            received += 1024
            yield b" " * 1024

    async with in_process(create_app(FakeBackend())) as client:
        answer = await client.post(PATH, content=endless())
        lying = await client.post(PATH, content=endless(), headers={"content-length": "9" * 6000})
    assert (answer.status_code, lying.status_code) == (413, 413)
    assert received == SETTINGS.max_body_bytes + 1024


async def test_a_body_of_exactly_the_limit_is_read() -> None:
    raw = json.dumps(BODY).encode()
    async with in_process(create_app(FakeBackend())) as client:
        exact = await client.post(PATH, content=raw.ljust(SETTINGS.max_body_bytes))
        longer = await client.post(PATH, content=raw.ljust(SETTINGS.max_body_bytes + 1))
    assert (exact.status_code, longer.status_code) == (200, 413)


async def test_a_full_gateway_refuses_with_retry_after_and_recovers() -> None:
    backend = FakeBackend()
    backend.replace_settings(max_streams=2)
    backend.pause_after = 0
    async with in_process(create_app(backend)) as client:
        held = [asyncio.create_task(client.post(PATH, json=BODY)) for _ in range(2)]
        await backend.wait_for(lambda: backend.num_open == 2)
        refused = await client.post(PATH, json=BODY)
        assert (await client.get("/v1/models")).status_code == 200
        backend.resume.set()
        assert [(await one).status_code for one in held] == [200, 200]
        assert (await client.post(PATH, json=BODY)).status_code == 200
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert "2 places" in refused.json()["error"]["message"]


async def test_a_permit_comes_back_after_every_kind_of_end() -> None:
    backend = FakeBackend()
    backend.replace_settings(max_streams=1)
    async with in_process(create_app(backend)) as client:
        bad = [{"content": b"{"}, {"json": {"model": "none"}}, {"json": BODY | {"prompt": "x" * 600}}]
        for request in bad:
            assert (await client.post(PATH, **request)).status_code in (400, 404)
        backend.fail_after = 1
        await client.post(PATH, json=BODY)
        await client.post(PATH, json=BODY | {"stream": True})
        backend.fail_after = None
        assert (await client.post(PATH, json=BODY | {"stream": True})).status_code == 200
        assert (await client.post(PATH, json=BODY)).status_code == 200


@pytest.mark.parametrize(
    ("mean_s", "num_permits", "num_refused", "expected_s"),
    [(0.01, 512, 1, 1.0), (30.0, 10, 1, 3.0), (30.0, 10, 4, 12.0), (30.0, 10, 0, 3.0), (5.0, 0, 1, 5.0)],
)
def test_retry_after_is_the_expected_wait(
    mean_s: float, num_permits: int, num_refused: int, expected_s: float
) -> None:
    assert retry_after_s(mean_s, num_permits, num_refused) == expected_s


async def test_settings_are_replaced_at_run_time() -> None:
    backend = FakeBackend()
    async with in_process(create_app(backend)) as client:
        assert (await client.post(PATH, json=BODY | {"n": 8})).status_code == 200
        backend.replace_settings(max_choices=4, max_stop_strings=1, max_logprobs=0, max_body_bytes=100)
        assert (await client.post(PATH, json=BODY | {"n": 8})).json()["error"]["param"] == "n"
        assert (await client.post(PATH, json=BODY | {"stop": ["a", "b"]})).json()["error"]["param"] == "stop"
        assert (await client.post(PATH, json=BODY | {"logprobs": 1})).json()["error"]["param"] == "logprobs"
        assert (await client.post(PATH, json=BODY | {"prompt": "x" * 100})).status_code == 413
        backend.replace_settings(max_streams=0)
        assert (await client.post(PATH, json=BODY)).status_code == 429


@pytest.mark.parametrize("path", [PATH, "/v1/embeddings"])
async def test_a_request_ends_at_its_deadline(path: str) -> None:
    backend = FakeBackend()
    backend.replace_settings(request_timeout_s=0.02)
    backend.pause_after = 0
    body = BODY if path == PATH else {"model": "embedder", "input": "hi"}
    async with in_process(create_app(backend)) as client:
        answer = await client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "deadline_exceeded")
    assert "0.02 s" in answer.json()["error"]["message"]
    assert backend.num_open == 0


async def test_a_stream_ends_at_its_deadline_with_an_error_event() -> None:
    backend = FakeBackend()
    backend.replace_settings(request_timeout_s=0.05)
    backend.pause_after = 2
    async with in_process(create_app(backend)) as client:
        answer = await client.post(PATH, json=BODY | {"stream": True})
    assert answer.status_code == 200
    assert "event: error\n" in answer.text
    assert '"code":"deadline_exceeded"' in answer.text
    assert backend.cancelled == [backend.requests[0].request_id]


async def test_a_body_that_never_ends_is_cut_at_the_deadline() -> None:
    backend = FakeBackend()
    backend.replace_settings(request_timeout_s=0.02)
    async with serving(create_app(backend)) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\n{{".encode())
        status, _ = await read_response_head(reader)
        writer.close()
    assert status == 408


async def test_the_backend_is_told_the_time_left() -> None:
    backend = FakeBackend()
    async with in_process(create_app(backend)) as client:
        await client.post(PATH, json=BODY)
    assert 0 < backend.requests[0].deadline_s <= SETTINGS.request_timeout_s


async def test_request_ids_are_echoed_and_lead_the_backends_ids() -> None:
    backend = FakeBackend()
    async with in_process(create_app(backend)) as client:
        named = await client.post(PATH, json=BODY, headers={"x-request-id": "trace 42"})
        again = await client.post(PATH, json=BODY, headers={"x-request-id": "trace 42"})
        own = await client.post(PATH, json=BODY)
        wrong = await client.post(PATH, content=b"{", headers={"x-request-id": "trace 43"})
        missing = await client.get("/nothing", headers={"x-request-id": "trace 44"})
    first, second, third = [request.request_id for request in backend.requests]
    assert named.headers["x-request-id"] == again.headers["x-request-id"] == "trace 42"
    assert first.startswith("trace 42-")
    assert second.startswith("trace 42-")
    assert first != second
    assert third.startswith(own.headers["x-request-id"])
    assert wrong.headers["x-request-id"] == "trace 43"
    assert missing.headers["x-request-id"] == "trace 44"


@pytest.mark.parametrize("value", [b"", b"x" * 129, b"tab\there", "é".encode()])
async def test_a_bad_request_id_is_refused(value: bytes) -> None:
    async with in_process(create_app(FakeBackend())) as client:
        answer = await client.post(PATH, json=BODY, headers=[(b"x-request-id", value)])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-id")


async def test_health() -> None:
    backend = FakeBackend()
    async with in_process(create_app(backend)) as client:
        healthy = await client.get("/health")
        backend.status = "starting"
        starting = await client.get("/health")
    assert healthy.status_code == 200
    idle = {"num_running": 0, "num_waiting": 0, "kv_used_fraction": 0.0}
    assert healthy.json()["models"][0] == {"model": "writer", "task": "generate", "num_replicas": 1} | idle
    assert starting.status_code == 503
    assert starting.json()["error"]["message"] == "The server is starting."


async def test_health_says_what_is_in_flight_and_what_it_holds() -> None:
    backend = FakeBackend()
    backend.pause_after = 1
    async with in_process(create_app(backend)) as client:
        asking = asyncio.create_task(client.post(PATH, json=BODY))
        await backend.wait_for(lambda: backend.num_open == 1)
        busy = (await client.get("/health")).json()
        backend.resume.set()
        await asking
        idle = (await client.get("/health")).json()
    assert (busy["num_requests"], busy["models"][0]["num_running"]) == (1, 1)
    assert (idle["num_requests"], idle["models"][0]["num_running"]) == (0, 0)


async def test_every_request_is_measured_once() -> None:
    backend, recorder = FakeBackend(), Recorder()
    async with in_process(create_app(backend, recorder)) as client:
        await client.post(PATH, json=BODY | {"max_tokens": 5})
        await client.post(PATH, json=BODY | {"stream": True})
        await client.post(PATH, json={"model": "none", "prompt": "x"})
        backend.fail_after = 1
        await client.post(PATH, json=BODY | {"stream": True})
        await client.get("/v1/models")
    answered = ["started", "first_token", "finished"]
    assert recorder.names == [*answered, *answered, "started", "refused", "started", "first_token", "refused"]
    finished = recorder.seen[2][1]
    assert finished.pop("seconds") > 0
    assert finished == {
        "endpoint": PATH,
        "model": "writer",
        "status": 200,
        "num_prompt_tokens": 2,
        "num_cached_tokens": 2,
        "num_completion_tokens": 5,
    }
    unknown, broken = recorder.seen[7][1], recorder.seen[10][1]
    assert (unknown["model"], unknown["status"], unknown["code"]) == ("", 404, "model_not_found")
    assert (broken["model"], broken["status"], broken["code"]) == ("writer", 500, "internal")


async def test_a_client_that_leaves_is_measured_as_499() -> None:
    backend, recorder = FakeBackend(), Recorder()
    backend.pause_after = 2
    async with serving(create_app(backend, recorder)) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        raw = json.dumps(BODY | {"stream": True}).encode()
        writer.write(f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
        await read_response_head(reader)
        writer.close()
        await backend.wait_for(lambda: bool(backend.cancelled))
    assert recorder.names == ["started", "first_token", "finished"]
    assert recorder.seen[-1][1]["status"] == 499
    assert recorder.seen[-1][1]["num_completion_tokens"] >= 1
