"""Where Serve deployments are bound together: arguments from the plan in, Serve applications out.

Serve calls a builder with the ``args`` of its config and reads the type from the signature, so this module does
without postponed annotations.
"""

import asyncio
import logging
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cluster.control.code import check_code_digest
from cluster.plan.placement import replica_bundles
from cluster.plan.serve_app import REPLICA_DEPLOYMENT
from cluster.plan.types import GatewayAppArgs, ModelAppArgs, RoutingTable
from cluster.telemetry.log import log_with_serve
from deployments.front import Front
from deployments.gateway.metrics import GatewayTelemetry
from deployments.gateway.thread import LoopThread
from deployments.replica.server import Replica
from deployments.router.connection import ReplicaEndpoint
from deployments.router.pool import ReplicaPool

logger = logging.getLogger(__name__)

_DISCOVERY_TIMEOUT_S = 5.0
_PULSE_TIMEOUT_S = 5.0

# Serve's access log would add a line for every discovery; gateway and replica log each request themselves.
_LOGGING = {"encoding": "JSON", "enable_access_log": False}


def build_model(args: ModelAppArgs) -> Application:
    """The application of one model version: the deployment ``Replica``, one placement group per replica.

    How many replicas, and the time each has to drain, come with Serve's config, where they change in place.
    """
    deployment = serve.deployment(Replica).options(
        ray_actor_options={"num_cpus": args.replica_cpus},
        placement_group_bundles=replica_bundles(args),
        placement_group_strategy=args.placement_strategy,
        max_ongoing_requests=1000,
        max_constructor_retry_count=1,
        health_check_period_s=2.0,
        logging_config=_LOGGING,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.1,
        max_surge_percent=100,
    )
    return deployment.bind(args)


def build_gateway(args: GatewayAppArgs) -> Application:
    """The gateway application: the deployment ``Gateway``, which speaks HTTP and routes by its ``user_config``."""
    deployment = serve.deployment(Gateway).options(
        num_replicas=args.num_replicas,
        ray_actor_options={"num_cpus": args.cpus},
        max_constructor_retry_count=1,
        health_check_period_s=2.0,
        logging_config=_LOGGING,
        graceful_shutdown_wait_loop_s=0.1,
        max_surge_percent=100,
    )
    return deployment.bind(args)


class Gateway:
    """One gateway replica: what Serve calls in, HTTP connections served out.

    The replica listens itself: neither Serve's proxy nor a Serve handle is on the path of a token. Serve places it,
    watches it, replaces it and hands it routing tables. Everything else runs on an event loop of its own.
    """

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
