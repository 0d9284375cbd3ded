"""Which application, and which of its replicas: pure choices from the routing table and the replicas' last loads."""

from collections.abc import Mapping, Sequence

from cluster.plan.types import RouteTarget
from deployments.messages import Load

_PROMPT_TOKENS = 256


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
    second old, so each request that it does not count yet is taken for a prompt of average length that waits.
    Fewest waiting tokens first, then fewest requests, then the id.
    """
    candidates = [replica for replica, load in loads.items() if not load.draining]
    if not candidates:
        return None

    def burden(replica: str) -> tuple[int, int, str]:
        load, num_open = loads[replica], in_flight.get(replica, 0)
        num_reported = load.num_running + load.num_waiting
        num_unreported = max(0, num_open - num_reported)
        return (
            load.num_waiting_tokens + num_unreported * _PROMPT_TOKENS,
            max(num_reported, num_open),
            replica,
        )

    return min(candidates, key=burden)
