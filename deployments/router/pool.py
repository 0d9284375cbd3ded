"""The live replicas of one application: found through Serve, connected once, dropped when lost."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from deployments.channel import ChannelError
from deployments.messages import Load
from deployments.router.choose import choose_replica
from deployments.router.connection import ReplicaConnection, ReplicaEndpoint

logger = logging.getLogger(__name__)

Discover = Callable[[], Awaitable[Sequence[ReplicaEndpoint]]]
Wake = Callable[[], Awaitable[ReplicaEndpoint]]

REFRESH_S = 1.0
_RETRY_S = 0.1


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
        self._search: asyncio.Task[None] | None = None
        self._task = asyncio.create_task(self._refresh_forever())

    @property
    def num_replicas(self) -> int:
        """Replicas that can take requests now."""
        return sum(
            not connection.is_lost and not connection.load.draining for connection in self._connections.values()
        )

    @property
    def loads(self) -> list[Load]:
        """What each connected replica said of itself last."""
        return [connection.load for connection in self._connections.values() if not connection.is_lost]

    async def acquire(self, exclude: frozenset[str] = frozenset()) -> ReplicaConnection:
        """The least loaded replica outside ``exclude``; waits for one to appear when there is none."""
        while (connection := self._choose(exclude)) is None:
            if self._search is None or self._search.done():
                self._search = asyncio.create_task(self._find())
            await asyncio.wait((self._search,), timeout=REFRESH_S)
        return connection

    async def _find(self) -> None:
        """Look for replicas once, on behalf of everybody who waits for one; fails quietly, they will ask again."""
        try:
            if self._connections:  # lost, draining, or tried already by whoever asks
                await asyncio.sleep(_RETRY_S)
                await self.refresh()
            else:
                await self._add([await self._wake()])
        except Exception as error:
            logger.warning("no replica of %s could be found: %r", self.app, error)
        if not self._connections:
            await asyncio.sleep(_RETRY_S)

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
            new = [endpoint for endpoint in endpoints if endpoint.replica_id not in self._connections]
            await asyncio.gather(*(self._connect(endpoint) for endpoint in new))

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
        """Stop looking for replicas and close every connection."""
        tasks = [task for task in (self._task, self._search) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in self._connections.values():
            await connection.close()
