"""The live replicas of one application: found through Serve, connected once, dropped when lost."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from deployments.channel import ChannelError
from deployments.messages import Load
from deployments.router.choose import choose_replica
from deployments.router.connection import ReplicaConnection, ReplicaEndpoint

logger = logging.getLogger(__name__)

Discover = Callable[[], Awaitable[Sequence[ReplicaEndpoint]]]
Wake = Callable[[], Awaitable[ReplicaEndpoint]]

REFRESH_S = 1.0
_MAX_PAUSE_S = 4.0
"""Between two looks at replicas that do not change; each asks every replica through the control plane."""
_MAX_BACK_OFF_S = 10.0
_HAND_OVER_S = 0.25
_RETRY_S = 0.1


def next_pause_s(pause_s: float, *, changed: bool, loads: Sequence[Load]) -> float:
    """How long to wait after a look that came ``pause_s`` after the one before: longer while nothing changes.

    Not so where work waits, so that replicas may be added, where one is on its way out, or none is there.
    """
    may_change_soon = changed or not loads or any(load.num_waiting or load.draining for load in loads)
    return REFRESH_S if may_change_soon else min(2 * pause_s, _MAX_PAUSE_S)


class NoReplicaError(Exception):
    """The application is no longer served, and none of its replicas is left to finish a request."""


class ReplicaPool:
    """Connections to every running replica of ``app``.

    ``discover`` lists the running replicas; ``wake`` waits until there is one (Serve starts it if there is none).
    Both go through the control plane: when it is away, the connections that exist keep serving.
    """

    def __init__(self, app: str, discover: Discover, wake: Wake) -> None:
        self.app = app
        self._discover = discover
        self._wake = wake
        self._connections: dict[str, ReplicaConnection] = {}
        self._changing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._num_leases = 0
        self._unused = asyncio.Event()
        self._retired = False
        self._is_outage_told = False
        self._is_closed = False
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

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Keep the pool open for a request, from its first replica to its last, also when it is retired meanwhile."""
        self._num_leases += 1
        try:
            yield
        finally:
            self._num_leases -= 1
            if not self._num_leases:
                self._unused.set()

    async def acquire(self, avoid: frozenset[str] = frozenset(), produces: str | None = None) -> ReplicaConnection:
        """The least loaded replica; waits for one to appear when there is none.

        One in ``avoid`` is taken only when there is no other. ``produces`` restricts the choice to replicas that
        continue another one's streams. Raises NoReplicaError when the pool is retired and nothing is left in it.
        """
        while (connection := self._choose(avoid, produces)) is None:
            if self._search is None or self._search.done():
                self._search = asyncio.create_task(self._find())
            search = self._search
            await asyncio.wait((search,), timeout=REFRESH_S)
            if self._retired and search.done() and self._choose(avoid, produces) is None:
                raise NoReplicaError(f"{self.app} is no longer served, and no replica of it is left")
        return connection

    def has_other(self, connection: ReplicaConnection) -> bool:
        """Whether the streams of ``connection`` could go on elsewhere at once."""
        other = self._choose(frozenset(), connection.produces)
        return other is not None and other is not connection

    async def _find(self) -> None:
        """Look for replicas once, on behalf of everybody who waits for one; fails quietly, they will ask again."""
        try:
            if any(not connection.is_lost for connection in self._connections.values()):
                # they drain, or are of another make than whoever asks needs
                await asyncio.sleep(_RETRY_S)
                await self.refresh()
            else:
                await self._add([await self._wake()])
            self._is_outage_told = False
        except Exception as error:
            self._tell_outage(error)
        if not self._connections:
            await asyncio.sleep(_RETRY_S)

    def _tell_outage(self, error: Exception) -> None:
        """Of an outage only the beginning is logged."""
        if not self._is_outage_told:
            logger.warning("no replica of %s can be found for now: %r", self.app, error)
        self._is_outage_told = True

    def _choose(self, avoid: frozenset[str], produces: str | None) -> ReplicaConnection | None:
        usable = {
            replica: connection
            for replica, connection in self._connections.items()
            if not connection.is_lost and produces in (None, connection.produces)
        }
        for candidates in (usable.keys() - avoid, usable.keys()):
            chosen = choose_replica(
                {replica: usable[replica].load for replica in candidates},
                {replica: usable[replica].num_open for replica in candidates},
            )
            if chosen is not None:
                return usable[chosen]
        return None

    async def refresh(self) -> bool:
        """Connect to replicas that appeared, forget those whose connection broke; whether there were any."""
        return await self._add(await self._discover())

    async def _add(self, endpoints: Sequence[ReplicaEndpoint]) -> bool:
        async with self._changing:
            lost = [replica for replica, connection in self._connections.items() if connection.is_lost]
            for replica in lost:
                await self._connections.pop(replica).close()
            new = [endpoint for endpoint in endpoints if endpoint.replica_id not in self._connections]
            await asyncio.gather(*(self._connect(endpoint) for endpoint in new))
            return bool(lost or new)

    async def _connect(self, endpoint: ReplicaEndpoint) -> None:
        try:
            connection = await ReplicaConnection.open(endpoint, on_leaving=self._changed.set)
        except ChannelError as error:
            logger.warning("replica %s of %s cannot be reached: %s", endpoint.replica_id, self.app, error)
            return
        self._connections[endpoint.replica_id] = connection
        for other in self._connections.values():
            if other.load.draining:
                other.offer_leave()

    async def _refresh_forever(self) -> None:
        pause_s = REFRESH_S
        while not self._is_closed:
            self._changed.clear()
            try:
                changed = await self.refresh()
                pause_s = next_pause_s(pause_s, changed=changed, loads=self.loads)
                self._is_outage_told = False
            except Exception as error:
                pause_s = min(2 * pause_s, _MAX_BACK_OFF_S)
                self._tell_outage(error)
            with suppress(TimeoutError):
                async with asyncio.timeout(_HAND_OVER_S if self._is_handing_over else pause_s):
                    await self._changed.wait()

    @property
    def _is_handing_over(self) -> bool:
        """Whether streams on a replica that leaves wait for another one."""
        return any(connection.load.draining and connection.num_open for connection in self._connections.values())

    async def close_when_unused(self) -> None:
        """Serve no new requests; close once those under way have ended."""
        self._retired = True
        try:
            while self._num_leases:
                self._unused.clear()
                await self._unused.wait()
        finally:
            await self.close()

    async def close(self) -> None:
        """Stop looking for replicas and close every connection."""
        # Being cancelled may be lost in a search: asyncio.wait_for, which Serve's handle uses, drops it before
        # Python 3.12 where the answer comes at the same moment (python/cpython#86296).
        self._is_closed = True
        self._changed.set()
        tasks = [task for task in (self._task, self._search) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in self._connections.values():
            await connection.close()
