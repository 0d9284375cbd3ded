"""The Serve class of one replica: what Serve calls in, what the replica's service does out.

Serve's builder and controller import this module, so it stays small; the service is imported when a
replica starts.
"""

import logging
import math
import time
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from cluster.control.code import check_code_digest
from cluster.plan.types import ModelAppArgs, ReplicaSettings
from cluster.telemetry.log import log_with_serve
from deployments.router.connection import ReplicaEndpoint

if TYPE_CHECKING:
    from deployments.replica.service import ReplicaService

logger = logging.getLogger(__name__)


class Replica:
    """One replica. Serve creates it inside the placement group that the plan asked for."""

    _service: "ReplicaService | None" = None
    _settings: ReplicaSettings | None = None

    async def __init__(self, args: ModelAppArgs) -> None:  # type: ignore[misc]  # Serve awaits constructors
        from deployments.replica.service import ReplicaService  # noqa: PLC0415 - not in the builder

        log_with_serve()
        begin = time.monotonic()
        check_code_digest(args.code_digest)
        group = ray.util.get_current_placement_group()
        if group is None:
            raise RuntimeError(f"{args.app}: a replica needs a placement group for its stages, but Serve made none")
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._service = await ReplicaService.start(args, replica_id, group)
        logger.info("%s: replica %s is ready after %.1f s", args.app, replica_id, time.monotonic() - begin)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over new settings; Serve calls this after the constructor and on every change."""
        self._settings = ReplicaSettings.model_validate(user_config)
        self._running.configure(self._settings)

    async def endpoint(self) -> ReplicaEndpoint:
        """Where gateways connect."""
        return self._running.endpoint

    async def check_health(self) -> None:
        """Raise when no token can be produced any more, so that Serve replaces this replica."""
        if self._running.failed is not None:
            raise RuntimeError(self._running.failed)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy sees of this replica."""
        load = self._running.load()
        target = self._settings.target_waiting_tokens if self._settings is not None else math.inf
        return {
            "waiting": load.num_waiting_tokens / target,
            "running": float(load.num_running),
            "kv_used_fraction": load.kv_used_fraction,
        }

    @property
    def _running(self) -> "ReplicaService":
        assert self._service is not None, "Serve calls a replica only after its constructor; this is a bug"
        return self._service

    async def __del__(self) -> None:
        """Serve calls this when the replica is to go, and gives it until the shutdown timeout."""
        if self._service is not None:
            await self._service.stop()
