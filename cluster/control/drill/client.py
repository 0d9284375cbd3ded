"""HTTP to the gateway as any client would speak it: asks in, Outcomes filled as the answers come in."""

import asyncio
import time
from types import TracebackType
from typing import Any, Self

import aiohttp

from cluster.control.drill.asks import Ask
from cluster.control.drill.outcome import Outcome, ResponseReader

_CONNECT_TIMEOUT_S = 10.0
_READ_BUFFER_BYTES = 2**20
"""An event with many log-probabilities is one long line."""


class Client:
    """Sends requests to one gateway, each over a connection of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),  # a kept connection may break for its age
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            read_bufsize=_READ_BUFFER_BYTES,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def send(self, outcome: Outcome, patience_s: float) -> None:
        """Send the ask and read to the end, which is ``unended`` when it does not come within ``patience_s``."""
        try:
            async with asyncio.timeout(patience_s):
                await self._read(outcome)
        except TimeoutError:
            _end_unended(outcome, patience_s)
        except (aiohttp.ClientError, OSError) as error:
            outcome.finish("broken", time.monotonic(), f"{type(error).__name__}: {error}")

    async def _read(self, outcome: Outcome) -> None:
        reader = ResponseReader(outcome)
        async with self._session.post(self._url + outcome.ask.path, json=outcome.ask.body) as response:
            outcome.status = response.status
            if response.status != 200:
                body = await response.read()
                reader.refused(response.status, body, response.headers.get("retry-after"), time.monotonic())
            elif not outcome.ask.streams:
                reader.whole(await response.read(), time.monotonic())
            else:
                async for line in response.content:
                    reader.line(line, time.monotonic())
        if outcome.end is None:
            outcome.finish("broken", time.monotonic(), "the stream ended without [DONE] and without an error")

    async def drop(self, ask: Ask, after_s: float) -> None:
        """Send ``ask`` and leave after ``after_s``, wherever the answer is then."""
        try:
            async with asyncio.timeout(after_s):
                async with self._session.post(self._url + ask.path, json=ask.body) as response:
                    await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return

    async def health(self) -> dict[str, Any]:
        """The gateway's own account of itself; empty while there is none."""
        try:
            async with self._session.get(f"{self._url}/health") as response:
                return dict(await response.json()) if response.status == 200 else {}
        except (aiohttp.ClientError, OSError, ValueError):
            return {}


def _end_unended(outcome: Outcome, patience_s: float) -> None:
    if outcome.end is None:
        outcome.finish("unended", time.monotonic(), f"no end after {patience_s:g} s")
    else:
        outcome.violations.append("the connection stays open after the end")
