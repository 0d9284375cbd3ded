"""What Serve is told: parts of a Plan in, the JSON bodies of ``PUT /api/serve/applications/`` out.

Ray accepts unknown keys in silence, so everything it reads is written here and nowhere else. The deployments' own
options (placement, surge) are set by the builders that ``import_path`` names, from ``args``; a change of those
restarts replicas. What is under ``deployments`` here changes in place.
"""

from collections.abc import Sequence
from typing import Any

from cluster.plan.types import GatewayAppArgs, ModelApp, Plan, ReplicaRange, RoutingTable

MODEL_BUILDER = "deployments.app:build_model"
GATEWAY_BUILDER = "deployments.app:build_gateway"
GATEWAY_APP = "gateway"
GATEWAY_DEPLOYMENT = "Gateway"
REPLICA_DEPLOYMENT = "Replica"
IN_PLACE = {
    "min_replicas": "replicas.min",
    "max_replicas": "replicas.max",
    "initial_replicas": "replicas.min",
    "upscale_delay_s": "replicas.upscale_delay",
    "downscale_delay_s": "replicas.downscale_delay",
    "target_waiting_tokens": "replicas.target_waiting_tokens",
    "request_timeout_s": "timeouts.request",
    "step_timeout_s": "timeouts.step",
    "drain_timeout_s": "timeouts.drain",
    "graceful_shutdown_timeout_s": "timeouts.drain",
}
"""Options of a model's deployment that change without a restart, and the keys of the YAML they come from."""
_SCALING_POLICY = "deployments.replica.autoscale:WaitingTokensPolicy"
_GRACE_S = 10.0
"""A replica that drains ends what is left by itself; Serve waits this much longer."""

ServeApp = dict[str, Any]
"""One entry of ``applications``, as Ray's ServeApplicationSchema has it."""

ServeProxies = dict[str, Any]
"""``proxy_location`` and ``http_options`` of Ray's ServeDeploySchema."""


def model_app(model: ModelApp, runtime_env: dict[str, str]) -> ServeApp:
    """The application of one model version. It has no route: requests reach it through the gateway."""
    app: ServeApp = {
        "name": model.app,
        "import_path": MODEL_BUILDER,
        "route_prefix": None,
        "args": model.constructor_args,
        "deployments": [
            {
                "name": REPLICA_DEPLOYMENT,
                "num_replicas": "auto",  # else Serve's controller would have to import the policy by itself
                "autoscaling_config": _autoscaling(model.replicas),
                "graceful_shutdown_timeout_s": model.settings.drain_timeout_s + _GRACE_S,
                "user_config": model.settings.model_dump(mode="json"),
            }
        ],
    }
    return app | ({"runtime_env": dict(runtime_env)} if runtime_env else {})


def _autoscaling(replicas: ReplicaRange) -> dict[str, Any]:
    """Serve's autoscaling options: between the bounds, by our policy. A change of the policy restarts replicas."""
    return {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "initial_replicas": max(1, replicas.min),
        "metrics_interval_s": 1.0,
        "look_back_period_s": 2.0,
        "upscale_delay_s": replicas.upscale_delay_s,
        "downscale_delay_s": replicas.downscale_delay_s,
        "policy": {"policy_function": _SCALING_POLICY},
    }


def gateway_app(args: GatewayAppArgs, routing: RoutingTable, runtime_env: dict[str, str]) -> ServeApp:
    """The application of the gateway; ``routing`` is replaced in place when only it changes.

    It has no route either: it listens by itself, and a proxy of Serve, where there is one, is not its business.
    """
    app: ServeApp = {
        "name": GATEWAY_APP,
        "import_path": GATEWAY_BUILDER,
        "route_prefix": None,
        "args": args.model_dump(mode="json"),
        "deployments": [
            {
                "name": GATEWAY_DEPLOYMENT,
                "graceful_shutdown_timeout_s": args.drain_timeout_s + _GRACE_S,
                "user_config": routing.model_dump(mode="json"),
            }
        ],
    }
    return app | ({"runtime_env": dict(runtime_env)} if runtime_env else {})


def model_apps(plan: Plan) -> list[ServeApp]:
    """Applications of all planned models, in the order of the YAML."""
    return [model_app(model.args, plan.runtime_env) for model in plan.models if model.args is not None]


NO_PROXIES: ServeProxies = {"proxy_location": "Disabled"}
"""Of a Serve that Manta starts: the gateway listens by itself, and no port is opened that the YAML does not name."""


def serve_config(proxies: ServeProxies, applications: Sequence[ServeApp]) -> dict[str, Any]:
    """The whole body of the PUT; applications that are not in it are removed by Serve.

    ``proxies`` are those that Serve runs with, which it cannot change: any other value would only make it warn.
    """
    return {**proxies, "applications": list(applications)}


def is_own(app: ServeApp) -> bool:
    """Whether an application that runs on the cluster was put there by Manta."""
    return app.get("import_path") in (MODEL_BUILDER, GATEWAY_BUILDER)
