"""Plain HTTP to the gateway inside the test's process, without a socket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from fastapi import FastAPI


@asynccontextmanager
async def in_process(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A client whose requests go straight to ``app``; an exception that escapes it fails the test."""
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://gateway") as client:
        yield client


async def post(app: FastAPI, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of one POST, with nothing between the test and the application; cheap enough to fuzz with."""
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    outgoing: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [],
    }

    async def receive() -> dict[str, Any]:
        return incoming.pop() if incoming else await asyncio.Event().wait() or {}

    async def send(message: dict[str, Any]) -> None:
        outgoing.append(message)

    await app(scope, receive, send)
    start, *pieces = outgoing
    return start["status"], b"".join(piece["body"] for piece in pieces)
