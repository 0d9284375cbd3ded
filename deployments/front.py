"""One gateway process: a router and an HTTP server, started, fed with routing tables, drained and ended together.

No Ray here: how replicas are found, and what owns the port, is told.
"""

import asyncio
from collections.abc import Callable
from typing import Self

from cluster.plan.types import GatewaySettings, RoutingTable
from deployments.gateway.app import create_app
from deployments.gateway.closing import Closing
from deployments.gateway.server import HttpServer
from deployments.gateway.sharing import SharedSocket, open_shared
from deployments.gateway.telemetry import Telemetry
from deployments.router.pool import ReplicaPool
from deployments.router.router import Router

# What a gateway knows between its start and its first routing table: nothing is served, nothing is accepted.
_CLOSED = RoutingTable(
    settings=GatewaySettings(
        max_body_bytes=1,
        max_streams=1,
        request_timeout_s=1.0,
        max_choices=1,
        max_stop_strings=0,
        max_logprobs=0,
    ),
    routes=(),
)


class Front:
    """Router and HTTP server of one process; every method runs on the loop that made it."""

    def __init__(self, open_pool: Callable[[str], ReplicaPool], telemetry: Telemetry) -> None:
        self._router = Router(_CLOSED, open_pool, telemetry.handed_over)
        closing = Closing()
        self._server = HttpServer(create_app(self._router, telemetry, closing=closing), closing)
        self._shared: SharedSocket | None = None

    @classmethod
    async def create(cls, open_pool: Callable[[str], ReplicaPool], telemetry: Telemetry) -> Self:
        """A front that does not listen yet."""
        return cls(open_pool, telemetry)

    async def route(self, table: RoutingTable) -> None:
        """Route by ``table`` from now on."""
        self._router.replace(table)

    async def listen(self, host: str, port: int, owner: str) -> None:
        """Accept connections on ``host:port``, unless it does already; ControlError when that is impossible."""
        if self._shared is not None:
            return
        self._shared = await asyncio.to_thread(open_shared, host, port, owner)
        self._server.start(self._shared.listening)
        asyncio.get_running_loop().add_reader(self._shared.hand_over, self._shared.give)

    async def pulse(self) -> int:
        """Connections that are open; that it answers at all says that the loop turns."""
        return self._server.num_connections

    async def close(self, patience_s: float) -> None:
        """Stop accepting, let requests end within ``patience_s``, close everything."""
        if self._shared is not None:
            asyncio.get_running_loop().remove_reader(self._shared.hand_over)
            self._shared.close()
            await self._server.drain(patience_s)
        await self._router.close()
