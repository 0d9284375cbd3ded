"""Whether the plan fits the nodes: replicas and nodes in, notes out, or a PlanError that names number and remedy."""

from collections.abc import Sequence

from cluster.errors import PlanError
from cluster.plan.placement import Amounts, Gang, all_fit, fits_one, replica_gang, totals
from cluster.plan.types import GatewayAppArgs, ModelApp, NodePlan, StagePlan
from cluster.units import format_bytes


def gateway_gangs(gateway: GatewayAppArgs) -> list[Gang]:
    """One gang per gateway process."""
    gang = Gang(name="gateway", bundles=({"CPU": gateway.cpus},), strategy="PACK")
    return [gang] * gateway.num_replicas


def check_capacity(apps: Sequence[ModelApp], gateway: GatewayAppArgs, nodes: Sequence[NodePlan]) -> None:
    """Refuse a plan whose gateway and ``replicas.min`` copies of every model cannot all be placed.

    Raises PlanError with the place, the number that breaks the limit, and what to change.
    """
    for args in apps:
        check_one_replica(args, nodes)
    gangs = _at_minimum(apps, gateway)
    if all_fit(gangs, nodes):
        return
    need, offer = totals([totals(gang.bundles) for gang in gangs]), _offer(nodes)
    for name, amount in need.items():
        if amount > offer.get(name, 0.0) + 1e-6:
            raise PlanError(
                f"cluster.nodes: the gateway and replicas.min copies of every model need {show(name, amount)}, but "
                f"all nodes together offer {show(name, offer.get(name, 0.0))}; {_remedy(name)}"
            )
    raise PlanError(
        f"cluster.nodes: found no arrangement of {sum(len(gang.bundles) for gang in gangs)} bundles "
        f"({show_all(need)}) on the nodes ({show_all(offer)}), though the sums fit; use more or larger nodes, "
        "a placement other than STRICT_PACK and STRICT_SPREAD, or shares of a GPU that go together on one"
    )


def can_surge(apps: Sequence[ModelApp], gateway: GatewayAppArgs, nodes: Sequence[NodePlan]) -> bool:
    """Whether a new version of any one model, with all its minimum of replicas, fits beside everything else.

    Serve calls a version running when all of them are, so room for only some would keep the old version for ever.
    """
    at_minimum = _at_minimum(apps, gateway)
    return all(all_fit([*at_minimum, *[replica_gang(args)] * max(1, args.replicas.min)], nodes) for args in apps)


def surge_batches(
    replacing: Sequence[str], apps: Sequence[ModelApp], gateway: GatewayAppArgs, nodes: Sequence[NodePlan]
) -> list[list[str]]:
    """The applications ``replacing`` others, in order, in groups whose new replicas fit beside all that runs.

    Two that start at once where there is room for one would each hold a part of it and wait for the rest for ever.
    One that does not fit even alone is a group of its own.
    """
    by_name = {app.app: app for app in apps}
    at_minimum = _at_minimum(apps, gateway)
    batches: list[list[str]] = []
    surge: list[Gang] = []
    for name in replacing:
        gangs = [replica_gang(by_name[name])] * max(1, by_name[name].replicas.min)
        if batches and all_fit([*at_minimum, *surge, *gangs], nodes):
            batches[-1].append(name)
            surge.extend(gangs)
        else:
            batches.append([name])
            surge = gangs
    return batches


def maximum_fits(
    args: ModelApp, apps: Sequence[ModelApp], gateway: GatewayAppArgs, nodes: Sequence[NodePlan]
) -> bool:
    """Whether ``args`` can have ``replicas.max`` copies while every other model has its minimum."""
    others = [other for other in apps if other.app != args.app]
    return all_fit([*_at_minimum(others, gateway), *[replica_gang(args)] * args.replicas.max], nodes)


def job_fits(
    name: str,
    bundles: Sequence[Amounts],
    apps: Sequence[ModelApp],
    gateway: GatewayAppArgs,
    nodes: Sequence[NodePlan],
) -> bool:
    """Whether the workers of a job fit beside the gateway and ``replicas.min`` copies of every model."""
    return all_fit([*_at_minimum(apps, gateway), Gang(name=name, bundles=tuple(bundles), strategy="PACK")], nodes)


def one_replica_fits(args: ModelApp, nodes: Sequence[NodePlan]) -> bool:
    """Whether one replica fits the nodes when nothing else runs there."""
    return all_fit([replica_gang(args)], nodes)


def _at_minimum(apps: Sequence[ModelApp], gateway: GatewayAppArgs) -> list[Gang]:
    return [gang for args in apps for gang in [replica_gang(args)] * args.replicas.min] + gateway_gangs(gateway)


def _offer(nodes: Sequence[NodePlan]) -> Amounts:
    return totals([{name: amount * node.max for name, amount in node.resources.items()} for node in nodes])


def check_one_replica(args: ModelApp, nodes: Sequence[NodePlan]) -> None:
    """Refuse a model of which one replica, alone on the nodes, cannot be placed; PlanError names the number."""
    gang = replica_gang(args)
    for stage, bundle in zip(args.stages, gang.bundles, strict=True):
        if not any(fits_one(bundle, dict(node.resources)) for node in nodes):
            raise PlanError(f"models.{args.model}: stage {stage.index} {_why_no_node(stage, bundle, nodes)}")
    if one_replica_fits(args, nodes):
        return
    raise PlanError(
        f"models.{args.model}: one replica needs {show_all(totals(gang.bundles))} in {len(gang.bundles)} bundles "
        f"placed {args.placement_strategy}, and the nodes offer {show_all(_offer(nodes))}; {_remedy('memory')}"
    )


def _why_no_node(stage: StagePlan, bundle: Amounts, nodes: Sequence[NodePlan]) -> str:
    for name, amount in bundle.items():
        largest = max(node.resources.get(name, 0.0) for node in nodes)
        if amount > largest + 1e-6:
            parts = ""
            if name == "memory":
                parts = (
                    f" (weights {format_bytes(stage.weight_bytes)}, KV cache {format_bytes(stage.kv_bytes)}, "
                    f"activations {format_bytes(stage.activation_bytes)})"
                )
            return (
                f"needs {show(name, amount)}{parts}, but the largest node has {show(name, largest)}; {_remedy(name)}"
            )
    return f"needs {show_all(bundle)} on one node, and no node has all of that; use larger nodes or more stages"


def _remedy(name: str) -> str:
    return {
        "CPU": "lower resources.stage_cpus, replica_cpus or gateway.cpus (they reserve only), or add nodes",
        "GPU": "lower resources.stage_gpus, use fewer stages or replicas, or add nodes with GPU",
        "memory": "use more stages, a smaller kv_cache.tokens or batching.max_step_tokens, or larger nodes",
    }.get(name, f"add {name} to the nodes")


def show(name: str, amount: float) -> str:
    """``amount`` of a resource for people: ``1.5GiB memory``, ``2 CPU``."""
    return f"{format_bytes(amount) if name == 'memory' else f'{amount:.4g}'} {name}"


def show_all(amounts: Amounts) -> str:
    """All of ``amounts`` for people, on one line."""
    return ", ".join(show(name, amount) for name, amount in amounts.items())
