"""The Serve class of one gateway replica: what Serve calls in, HTTP connections served out.

The replica listens itself: neither Serve's proxy nor a Serve handle is on the path of a token. Serve places it,
watches it, replaces it and hands it routing tables. HTTP, router and channels run on a loop of their own.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Self

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.control.code import check_code_digest
from cluster.plan.serve_app import REPLICA_DEPLOYMENT
from cluster.plan.types import GatewayAppArgs, GatewaySettings, RoutingTable
from cluster.telemetry.log import log_with_serve
from deployments.gateway.app import create_app
from deployments.gateway.closing import Closing
from deployments.gateway.metrics import GatewayTelemetry
from deployments.gateway.server import HttpServer
from deployments.gateway.sharing import SharedSocket, open_shared
from deployments.gateway.telemetry import Telemetry
from deployments.gateway.thread import LoopThread
from deployments.router.connection import ReplicaEndpoint
from deployments.router.pool import ReplicaPool
from deployments.router.router import Router

logger = logging.getLogger(__name__)

_DISCOVERY_TIMEOUT_S = 5.0
_PULSE_TIMEOUT_S = 5.0

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
        self._router = Router(_CLOSED, open_pool)
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
        await self._server.start(self._shared.listening)
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


class Gateway:
    """One gateway replica: the OpenAI surface over a router. Its routing table is replaced in place."""

    _front: Front | None = None

    async def __init__(self, args: GatewayAppArgs) -> None:  # type: ignore[misc]  # Serve awaits constructors
        log_with_serve()
        check_code_digest(args.code_digest)
        self._args = args
        self._thread = LoopThread("manta-gateway")
        self._front = await self._thread.run(Front.create(open_pool, GatewayTelemetry()))

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Route by a new table; Serve calls this at start and on every change. The first one opens the port."""
        await self._thread.run(self._running.route(RoutingTable.model_validate(user_config)))
        owner = ray.get_runtime_context().get_session_name()
        await self._thread.run(self._running.listen(self._args.http_host, self._args.http_port, owner))

    async def check_health(self) -> None:
        """Raise when the gateway's loop does not turn any more, so that Serve replaces this replica."""
        async with asyncio.timeout(_PULSE_TIMEOUT_S):
            await self._thread.run(self._running.pulse())

    @property
    def _running(self) -> Front:
        assert self._front is not None, "Serve calls a replica only after its constructor; this is a bug"
        return self._front

    async def __del__(self) -> None:
        """Serve calls this when the replica is to go, and gives it until the shutdown timeout."""
        if self._front is not None:
            await self._thread.run(self._front.close(self._args.drain_timeout_s))
            await self._thread.stop()
            logger.info("gateway: drained")


def open_pool(app: str) -> ReplicaPool:
    """The replicas of application ``app``, found through its Serve handle."""
    handle: DeploymentHandle = serve.get_deployment_handle(REPLICA_DEPLOYMENT, app_name=app)

    async def discover() -> list[ReplicaEndpoint]:
        broadcast = handle.broadcast("endpoint")
        # one that is dying, or stuck, must not hide the others
        found = await broadcast.results_async(timeout_s=_DISCOVERY_TIMEOUT_S, return_exceptions=True)
        return [endpoint for endpoint in found if isinstance(endpoint, ReplicaEndpoint)]

    async def wake() -> ReplicaEndpoint:
        found: ReplicaEndpoint = await handle.endpoint.remote()
        return found

    return ReplicaPool(app, discover, wake)
