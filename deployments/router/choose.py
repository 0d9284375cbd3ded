"""Which application, and which of its replicas: pure choices from the routing table and the replicas' last loads."""

from collections.abc import Mapping, Sequence

from cluster.plan.types import RouteTarget
from deployments.messages import Load


def choose_target(targets: Sequence[RouteTarget], point: float) -> RouteTarget:
    """The target whose share of the total weight covers ``point`` in [0, 1)."""
    remaining = point * sum(target.weight for target in targets)
    for target in targets:
        remaining -= target.weight
        if remaining < 0:
            return target
    return targets[-1]


def choose_replica(loads: Mapping[str, Load], in_flight: Mapping[str, int]) -> str | None:
    """The least loaded replica that is not draining; None when there is none.

    ``in_flight`` counts the requests this gateway has open on each replica: a replica's own report is up to a
    second old, so what was sent since must count too. Fewest waiting tokens first, then fewest requests, then the id.
    """
    candidates = [replica for replica, load in loads.items() if not load.draining]
    if not candidates:
        return None
    return min(
        candidates,
        key=lambda replica: (
            loads[replica].num_waiting_tokens,
            max(loads[replica].num_running + loads[replica].num_waiting, in_flight.get(replica, 0)),
            replica,
        ),
    )
