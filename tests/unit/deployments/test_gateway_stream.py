"""Streams: framing, timing, heartbeats, failures, and what happens when the client leaves."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi import FastAPI

from deployments.gateway.app import create_app
from deployments.gateway.chunks import encode_text
from deployments.gateway.merge import MAX_QUEUED_DELTAS
from deployments.messages import Refused
from tests.support.fake_backend import FakeBackend, expected_text
from tests.support.gateway_client import in_process
from tests.support.gateway_server import read_response_head, serving

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def posting(app: FastAPI, path: str, body: dict[str, Any]) -> AsyncIterator[Connection]:
    """A raw connection on which the request has been sent."""
    async with serving(app) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        try:
            yield reader, writer
        finally:
            writer.close()


async def read_chunk(reader: asyncio.StreamReader) -> bytes:
    """One chunk of a chunked HTTP body."""
    size = int(await reader.readline(), 16)
    data = await reader.readexactly(size)
    await reader.readexactly(2)
    return data


def events(body: bytes) -> list[Any]:
    """The JSON of every data event, ``[DONE]`` as text."""
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == ""
    datas = [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


async def test_events_are_framed_as_openai_frames_them() -> None:
    async with in_process(create_app(FakeBackend())) as client:
        body = {"model": "writer", "prompt": "hi", "seed": 1, "stream": True}
        answer = await client.post("/v1/completions", json=body | {"stream_options": {"include_usage": True}})
        plain = await client.post("/v1/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, usage, done = events(answer.content)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 18
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert chunks[0] == {
        "id": chunks[0]["id"],
        "object": "text_completion",
        "created": chunks[0]["created"],
        "model": "writer",
        "system_fingerprint": "writer-v1",
        "choices": [
            {"index": 0, "text": expected_text("hi", 1, 0, 1), "logprobs": None, "finish_reason": None},
        ],
        "usage": None,
    }
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 15 + ["length"]
    assert all("usage" not in chunk for chunk in events(plain.content)[:-1])


async def test_text_survives_clients_that_split_lines_their_own_way() -> None:
    async with in_process(create_app(FakeBackend())) as client:
        answer = await client.post(
            "/v1/chat/completions",
            json={
                "model": "writer",
                "messages": [{"role": "user", "content": "x"}],
                "max_tokens": 300,
                "ignore_eos": True,
                "stream": True,
            },
        )
    text = expected_text("<user>x", 7, 0, 300)
    assert "\u2028" in text
    lines = [line for line in answer.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text


@pytest.mark.parametrize("text", ["", "plain", 'quo"te\\', "\n\r\t\x00", "é✓😀", "\x85\u2028\u2029"])
def test_encoded_text_is_the_same_text(text: str) -> None:
    encoded = encode_text(text)
    assert json.loads(encoded) == text
    assert len(encoded.decode().splitlines()) == 1


async def test_the_first_token_is_sent_before_the_second_exists() -> None:
    backend = FakeBackend()
    backend.pause_after = 1
    async with posting(
        create_app(backend), "/v1/completions", {"model": "writer", "prompt": "hi", "seed": 1, "stream": True}
    ) as (reader, _):
        status, headers = await read_response_head(reader)
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        [first] = events(await read_chunk(reader))
        assert first["choices"][0]["text"] == expected_text("hi", 1, 0, 1)
        backend.resume.set()
        rest = b""
        while not rest.endswith(b"data: [DONE]\n\n"):
            rest += await read_chunk(reader)
    text = "".join(chunk["choices"][0]["text"] for chunk in events(rest)[:-1])
    assert first["choices"][0]["text"] + text == expected_text("hi", 1, 0, 16)


async def test_what_is_queued_goes_out_together() -> None:
    backend = FakeBackend()
    backend.in_one_go = True
    body = {"model": "writer", "prompt": "hi", "seed": 1, "n": 2, "max_tokens": 20, "stream": True}
    async with in_process(create_app(backend)) as client:
        answer = await client.post("/v1/completions", json=body)
    *chunks, done = events(answer.content)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [
        expected_text("hi", 1, index, 20) for index in (0, 1)
    ]


async def test_a_slow_reader_does_not_fill_the_memory() -> None:
    backend = FakeBackend()
    backend.in_one_go = True
    body = {"model": "writer", "prompt": "hi", "n": 8, "max_tokens": 500, "ignore_eos": True, "stream": True}
    async with in_process(create_app(backend)) as client:
        answer = await client.post("/v1/completions", json=body)
    *chunks, _ = events(answer.content)
    assert len(chunks) >= 8 * 500 // MAX_QUEUED_DELTAS
    texts = ["".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i) for i in range(8)]
    assert texts == [expected_text("hi", 7, index, 500) for index in range(8)]


async def test_heartbeats_while_waiting_and_a_late_refusal_is_an_event() -> None:
    backend = FakeBackend()
    backend.pause_after = 0
    backend.fail_after = 0
    app = create_app(backend, heartbeat_s=0.01)
    async with posting(app, "/v1/completions", {"model": "writer", "prompt": "hi", "stream": True}) as (reader, _):
        assert (await read_response_head(reader))[0] == 200
        assert await read_chunk(reader) == b": waiting\n\n"
        assert await read_chunk(reader) == b": waiting\n\n"
        backend.resume.set()
        last = b": waiting\n\n"
        while last == b": waiting\n\n":
            last = await read_chunk(reader)
        kind, data = last.decode().strip().split("\n")
        assert await read_chunk(reader) == b""
    assert kind == "event: error"
    error = json.loads(data.removeprefix("data: "))["error"]
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, "internal")


@pytest.mark.parametrize("prompts", ["hi", ["hi", "ho", "hu"]])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_its_request(stream: bool, prompts: object) -> None:
    backend = FakeBackend()
    backend.pause_after = 2
    num_prompts = 1 if prompts == "hi" else 3
    app = create_app(backend)
    async with posting(app, "/v1/completions", {"model": "writer", "prompt": prompts, "stream": stream}) as (
        _,
        writer,
    ):
        await backend.wait_for(lambda: backend.num_open == num_prompts)
        writer.close()
        await backend.wait_for(lambda: len(backend.cancelled) == num_prompts and backend.num_open == 0)
    assert sorted(backend.cancelled) == sorted(request.request_id for request in backend.requests)


async def test_a_client_that_leaves_an_embedding_cancels_it() -> None:
    backend = FakeBackend()
    backend.pause_after = 0
    async with posting(create_app(backend), "/v1/embeddings", {"model": "embedder", "input": "x"}) as (_, writer):
        await backend.wait_for(lambda: backend.num_open == 1)
        writer.close()
        await backend.wait_for(lambda: backend.num_open == 0)


def broken(backend: FakeBackend) -> None:
    backend.fail_after = 2
    backend.failure = ZeroDivisionError("secret detail")


def unfinished(backend: FakeBackend) -> None:
    backend.stop_early = True


@pytest.mark.parametrize("breaks", [broken, unfinished])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_bug_in_the_backend_is_an_internal_error_without_detail(
    breaks: Callable[[FakeBackend], None], stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend = FakeBackend()
    breaks(backend)
    async with in_process(create_app(backend)) as client:
        answer = await client.post("/v1/completions", json={"model": "writer", "prompt": "hi", "stream": stream})
    assert answer.status_code == (200 if stream else 500)
    assert '"code":"internal"' in answer.text
    assert "[DONE]" not in answer.text
    assert "secret" not in answer.text
    assert any(record.levelname == "ERROR" for record in caplog.records)
    assert backend.num_open == 0


async def test_one_refused_prompt_ends_the_others() -> None:
    backend = FakeBackend()
    async with in_process(create_app(backend)) as client:
        body = {"model": "writer", "prompt": ["hi", "x" * 600, "ho"]}
        answer = await client.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert backend.num_open == 0


async def test_a_refusal_before_the_first_token_is_a_status_even_when_streaming() -> None:
    backend = FakeBackend()
    backend.refuse = Refused(request_id="", code="overloaded", message="queue full", retry_after_s=4)
    async with in_process(create_app(backend)) as client:
        answer = await client.post("/v1/completions", json={"model": "writer", "prompt": "hi", "stream": True})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "4")
