"""The HTTP server of one gateway process: a listening socket and an ASGI application in, connections served out.

Start, serve, drain, stop - in that order. Draining refuses nobody: another process accepts from the same socket.
"""

import asyncio
import logging
import socket
import time
from email.utils import formatdate

import uvicorn
from starlette.types import ASGIApp

from deployments.gateway.accepting import Acceptor
from deployments.gateway.closing import Closing
from deployments.gateway.protocol import ConnectionState, LimitedProtocol

KEEP_ALIVE_S = 75
"""Longer than load balancers keep an idle connection (60 s), so that it is they who close."""
_CUT_GRACE_S = 2.0
"""What a request has left after its limit to send its last words."""

logger = logging.getLogger(__name__)


class HttpServer:
    """Serves ``app`` on a socket; ``closing`` is the same that the application reads."""

    def __init__(self, app: ASGIApp, closing: Closing) -> None:
        self._config = uvicorn.Config(
            app,
            http=LimitedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._closing = closing
        self._state = ConnectionState()
        self._acceptor: Acceptor | None = None
        self._clock: asyncio.TimerHandle | None = None

    @property
    def num_connections(self) -> int:
        """Connections that are open now."""
        return len(self._state.connections)

    def start(self, listening: socket.socket) -> None:
        """Accept from ``listening``, which is closed with the server."""
        self._config.load()
        self._tell_time()
        self._acceptor = Acceptor(listening, self._protocol)

    def _protocol(self) -> LimitedProtocol:
        return LimitedProtocol(config=self._config, server_state=self._state, app_state={})

    def _tell_time(self) -> None:
        """Every second: the date header."""
        self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
        self._clock = asyncio.get_running_loop().call_later(1.0, self._tell_time)

    async def drain(self, patience_s: float) -> None:
        """Accept no more, let requests under way end within ``patience_s``, cut what is left then."""
        if self._acceptor is None:
            return
        self._closing.begin(patience_s)
        await self._acceptor.stop()
        for connection in tuple(self._state.connections):
            connection.begin_closing()  # type: ignore[union-attr]
        try:
            async with asyncio.timeout(patience_s + _CUT_GRACE_S):
                await self._all_gone()
        except TimeoutError:
            logger.warning("%d connections are cut after %g s", self.num_connections, patience_s)
        await self.stop()

    async def _all_gone(self) -> None:
        while self._state.connections:
            self._state.lost.clear()
            await self._state.lost.wait()
        if self._state.tasks:
            await asyncio.wait(tuple(self._state.tasks))

    async def stop(self) -> None:
        """Break off everything."""
        if self._clock is not None:
            self._clock.cancel()
        if self._acceptor is not None:
            await self._acceptor.stop()
        for connection in tuple(self._state.connections):
            connection.transport.abort()
        if self._state.tasks:
            await asyncio.wait(tuple(self._state.tasks))
