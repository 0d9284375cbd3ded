"""What the cluster has free now: Ray's control store in, resources by node and the nodes that will go out."""

from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without stubs

from cluster.config.nodes import TRAIN_SLOT
from train_jobs.supervision.room import quietest

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


def quietest_node() -> str | None:
    """The node that has the most cores free, of those that train and stay; None when there is none."""
    view = view_cluster()
    training = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(TRAIN_SLOT)}
    return quietest({node: view.free.get(node, {}) for node in sorted(training - view.leaving)})
