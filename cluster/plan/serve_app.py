"""What Serve is told: parts of a Plan in, the JSON bodies of ``PUT /api/serve/applications/`` out.

Ray accepts unknown keys in silence, so everything it reads is written here and nowhere else. The deployments' own
options (placement, autoscaling, surge) are set by the builders that ``import_path`` names, from ``args``.
"""

from collections.abc import Sequence
from typing import Any

from cluster.plan.types import GatewayAppArgs, ModelAppArgs, Plan, RoutingTable

MODEL_BUILDER = "deployments.app:build_model"
GATEWAY_BUILDER = "deployments.app:build_gateway"
GATEWAY_APP = "gateway"
GATEWAY_DEPLOYMENT = "Gateway"

ServeApp = dict[str, Any]
"""One entry of ``applications``, as Ray's ServeApplicationSchema has it."""


def model_app(args: ModelAppArgs, runtime_env: dict[str, str]) -> ServeApp:
    """The application of one model version. It has no route: requests reach it through the gateway."""
    app: ServeApp = {
        "name": args.app,
        "import_path": MODEL_BUILDER,
        "route_prefix": None,
        "args": args.model_dump(mode="json"),
    }
    return app | ({"runtime_env": dict(runtime_env)} if runtime_env else {})


def gateway_app(args: GatewayAppArgs, routing: RoutingTable, runtime_env: dict[str, str]) -> ServeApp:
    """The application of the gateway; ``routing`` is replaced in place when only it changes."""
    app: ServeApp = {
        "name": GATEWAY_APP,
        "import_path": GATEWAY_BUILDER,
        "route_prefix": "/",
        "args": args.model_dump(mode="json"),
        "deployments": [{"name": GATEWAY_DEPLOYMENT, "user_config": routing.model_dump(mode="json")}],
    }
    return app | ({"runtime_env": dict(runtime_env)} if runtime_env else {})


def model_apps(plan: Plan) -> list[ServeApp]:
    """Applications of all planned models, in the order of the YAML."""
    return [model_app(model.args, plan.runtime_env) for model in plan.models if model.args is not None]


def serve_config(plan: Plan, applications: Sequence[ServeApp]) -> dict[str, Any]:
    """The whole body of the PUT; applications that are not in it are removed by Serve."""
    return {
        "proxy_location": plan.proxy_location,
        "http_options": {"host": plan.http_host, "port": plan.http_port},
        "applications": list(applications),
    }


def is_own(app: ServeApp) -> bool:
    """Whether an application that runs on the cluster was put there by Manta."""
    return app.get("import_path") in (MODEL_BUILDER, GATEWAY_BUILDER)
