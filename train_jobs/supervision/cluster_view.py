"""What the cluster has free now: Ray's control store in, resources by node and the nodes that will go out."""

from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without stubs

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """Nodes that live, by id."""

    free: dict[str, dict[str, float]]
    leaving: frozenset[str]
    """Those of them that drain."""


def view_cluster() -> ClusterView:
    """Of the cluster that this process is connected to."""
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    draining = client.get_draining_nodes(timeout=_TIMEOUT_S)
    return ClusterView(
        free=available_resources_per_node(),
        leaving=frozenset(node if isinstance(node, str) else node.hex() for node in draining),
    )
