"""The gateway's routing table: limits and running model versions in, a RoutingTable out."""

from collections.abc import Iterator, Sequence

from cluster.config.gateway import LimitsSection
from cluster.plan.types import GatewaySettings, ModelPlan, Route, RouteTarget, RoutingTable


def gateway_settings(limits: LimitsSection) -> GatewaySettings:
    """The ``gateway.limits`` section as the gateway reads it."""
    return GatewaySettings(
        max_body_bytes=limits.max_body,
        max_streams=limits.max_streams,
        request_timeout_s=limits.request_timeout,
        max_choices=limits.max_choices,
        max_stop_strings=limits.max_stop_strings,
        max_logprobs=limits.max_logprobs,
    )


def routing_table(settings: GatewaySettings, models: Sequence[ModelPlan]) -> RoutingTable:
    """One route per planned model and adapter, all its traffic to its one version."""
    routes = (route for model in models if model.args is not None for route in _routes(model))
    return RoutingTable(settings=settings, routes=tuple(routes))


def _routes(model: ModelPlan) -> Iterator[Route]:
    """The model's own, and one for each of its adapters, which lead to the same application."""
    assert model.args is not None
    assert model.created is not None
    target = RouteTarget(app=model.args.app, version=model.args.version)
    route = Route(
        model=model.name,
        task=model.task,
        context_tokens=model.args.context_tokens,
        created=model.created,
        targets=(target,),
        min_replicas=model.args.replicas.min,
    )
    yield route
    for adapter in model.adapters:
        yield route.model_copy(update={"model": adapter.name, "created": adapter.created, "parent": model.name})
