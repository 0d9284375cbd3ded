"""Where Serve deployments are bound together: arguments from the plan in, Serve applications out.

Serve calls a builder with the ``args`` of its config and reads the type from the signature, so this module does
without postponed annotations.
"""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cluster.control.code import check_code_digest
from cluster.plan.placement import replica_bundles
from cluster.plan.serve_app import REPLICA_DEPLOYMENT
from cluster.plan.types import GatewayAppArgs, GatewaySettings, ModelAppArgs, RoutingTable
from cluster.telemetry.log import log_with_serve
from deployments.gateway.app import create_app
from deployments.gateway.metrics import GatewayTelemetry
from deployments.replica.server import Replica
from deployments.router.connection import ReplicaEndpoint
from deployments.router.pool import ReplicaPool
from deployments.router.router import Router

_DISCOVERY_TIMEOUT_S = 5.0

# Serve's access log would add a line for every discovery; gateway and replica log each request themselves.
_LOGGING = {"encoding": "JSON", "enable_access_log": False}

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
    deployment = serve.deployment(serve.ingress()(Gateway)).options(
        num_replicas=args.num_replicas,
        ray_actor_options={"num_cpus": args.cpus},
        max_ongoing_requests=100_000,
        health_check_period_s=2.0,
        logging_config=_LOGGING,
        max_surge_percent=100,
    )
    return deployment.bind(args)


class Gateway:
    """One gateway replica: the OpenAI surface over a router. Its routing table is replaced in place."""

    async def __init__(self, args: GatewayAppArgs) -> None:  # type: ignore[misc]  # Serve awaits constructors
        log_with_serve()
        check_code_digest(args.code_digest)
        self._router = Router(_CLOSED, open_pool)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Route by a new table; Serve calls this at start and on every change."""
        self._router.replace(RoutingTable.model_validate(user_config))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for the ASGI application once the constructor is done."""
        # Serve's own middleware answers with the request id already
        return create_app(self._router, GatewayTelemetry(), answers_request_id=False)


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
