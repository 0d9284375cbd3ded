"""What Ray's control store knows of nodes that a replica must know too."""

import asyncio

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without stubs

_TIMEOUT_S = 2.0


class DrainingNodes:
    """Lists the nodes that drain. Ray's State API shows them as alive; only the control store tells."""

    def __init__(self) -> None:
        self._client = GcsClient(address=ray.get_runtime_context().gcs_address)

    async def list(self) -> frozenset[str]:
        """Ids of nodes that drain; raises Ray's error while the control store is away."""
        found = await asyncio.to_thread(self._client.get_draining_nodes, timeout=_TIMEOUT_S)
        return frozenset(node_id if isinstance(node_id, str) else node_id.hex() for node_id in found)
