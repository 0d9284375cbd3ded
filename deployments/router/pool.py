"""The live replicas of one application: found through Serve, connected once, dropped when lost."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from deployments.channel import ChannelError
from deployments.router.choose import choose_replica
from deployments.router.connection import ReplicaConnection, ReplicaEndpoint

logger = logging.getLogger(__name__)

Discover = Callable[[], Awaitable[Sequence[ReplicaEndpoint]]]
Wake = Callable[[], Awaitable[ReplicaEndpoint]]

REFRESH_S = 1.0


class ReplicaPool:
    """Connections to every running replica of ``app``.

    ``discover`` lists the running replicas; ``wake`` waits until there is one (Serve starts it if there is none).
    """

    def __init__(self, app: str, discover: Discover, wake: Wake) -> None:
        self.app = app
        self._discover = discover
        self._wake = wake
        self._connections: dict[str, ReplicaConnection] = {}
        self._changing = asyncio.Lock()
        self._task = asyncio.create_task(self._refresh_forever())

    @property
    def num_replicas(self) -> int:
        """Replicas that can take requests now."""
        return sum(not connection.is_lost for connection in self._connections.values())

    async def acquire(self, exclude: frozenset[str] = frozenset()) -> ReplicaConnection:
        """The least loaded replica outside ``exclude``; waits for one to appear when there is none."""
        while True:
            connection = self._choose(exclude)
            if connection is not None:
                return connection
            if self._connections:
                await asyncio.sleep(REFRESH_S / 10)
                await self.refresh()
            else:
                await self._add([await self._wake()])

    def _choose(self, exclude: frozenset[str]) -> ReplicaConnection | None:
        usable = {
            replica: connection
            for replica, connection in self._connections.items()
            if not connection.is_lost and replica not in exclude
        }
        chosen = choose_replica(
            {replica: connection.load for replica, connection in usable.items()},
            {replica: connection.num_open for replica, connection in usable.items()},
        )
        return usable[chosen] if chosen is not None else None

    async def refresh(self) -> None:
        """Connect to replicas that appeared, forget those whose connection broke."""
        await self._add(await self._discover())

    async def _add(self, endpoints: Sequence[ReplicaEndpoint]) -> None:
        async with self._changing:
            lost = [replica for replica, connection in self._connections.items() if connection.is_lost]
            for replica in lost:
                await self._connections.pop(replica).close()
            for endpoint in endpoints:
                if endpoint.replica_id not in self._connections:
                    await self._connect(endpoint)

    async def _connect(self, endpoint: ReplicaEndpoint) -> None:
        try:
            self._connections[endpoint.replica_id] = await ReplicaConnection.open(endpoint)
        except ChannelError as error:
            logger.warning("replica %s of %s cannot be reached: %s", endpoint.replica_id, self.app, error)

    async def _refresh_forever(self) -> None:
        while True:
            try:
                await self.refresh()
            except Exception:
                # Discovery goes through the control plane; while that is away the known connections keep serving.
                logger.exception("the replicas of %s could not be listed", self.app)
            await asyncio.sleep(REFRESH_S)

    async def close_when_idle(self) -> None:
        """Close once the requests under way have ended."""
        for connection in tuple(self._connections.values()):
            await connection.wait_idle()
        await self.close()

    async def close(self) -> None:
        """Stop refreshing and close every connection."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for connection in self._connections.values():
            await connection.close()
