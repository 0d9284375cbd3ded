"""Where Serve deployments are bound together: arguments from the plan in, Serve applications out.

Serve calls a builder with the ``args`` of its config and reads the type from the signature, so this module does
without postponed annotations.
"""

from ray import serve
from ray.serve import Application

from cluster.plan.placement import replica_bundles
from cluster.plan.types import GatewayAppArgs, ModelAppArgs
from deployments.front import Gateway
from deployments.replica.server import Replica

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
