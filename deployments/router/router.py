"""The gateway's backend: model name -> application -> replica -> its replies."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.plan.types import Route, RoutingTable
from deployments.gateway.backend import Event, Health, ModelHealth
from deployments.messages import (
    Delta,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    Finished,
    Generate,
    Refused,
    RequestRefused,
    Started,
    Tokenize,
    Tokenized,
)
from deployments.router.choose import choose_target
from deployments.router.connection import ReplicaConnection, ReplicaLostError, Reply, Request
from deployments.router.pool import ReplicaPool

# A tokenizer question carries no deadline of its own.
_QUESTION_TIMEOUT_S = 30.0
_MAX_ATTEMPTS = 3


class Router:
    """Implements the gateway's ``Backend`` over connections to replicas."""

    def __init__(self, table: RoutingTable, open_pool: Callable[[str], ReplicaPool]) -> None:
        self._table = table
        self._open_pool = open_pool
        self._pools: dict[str, ReplicaPool] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.replace(table)

    @property
    def table(self) -> RoutingTable:
        """The routing table in force."""
        return self._table

    def replace(self, table: RoutingTable) -> None:
        """Route by ``table`` from now on; requests already under way end where they are."""
        self._table = table
        wanted = {target.app for route in table.routes for target in route.targets}
        for app in wanted - self._pools.keys():
            self._pools[app] = self._open_pool(app)
        for app in self._pools.keys() - wanted:
            task = asyncio.create_task(self._pools.pop(app).close_when_idle())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def find(self, model: str) -> Route | None:
        """The route that serves ``model``."""
        return next((route for route in self._table.routes if route.model == model), None)

    def health(self) -> Health:
        """``ok`` when every served model has a replica."""
        models = tuple(self._model_health(route) for route in self._table.routes)
        return Health(status="ok" if all(model.num_replicas for model in models) else "starting", models=models)

    def _model_health(self, route: Route) -> ModelHealth:
        pools = [self._pools[target.app] for target in route.targets]
        loads = [load for pool in pools for load in pool.loads]
        return ModelHealth(
            model=route.model,
            task=route.task,
            num_replicas=sum(pool.num_replicas for pool in pools),
            num_running=sum(load.num_running for load in loads),
            num_waiting=sum(load.num_waiting for load in loads),
            kv_used_fraction=max((load.kv_used_fraction for load in loads), default=0.0),
        )

    async def generate(self, model: str, request: Generate) -> AsyncGenerator[Event]:
        """Events of one request; a replica that is lost before the first token is replaced by another."""
        deadline = time.monotonic() + request.deadline_s
        lost: frozenset[str] = frozenset()
        announced = begun = False
        while True:
            connection = await self._acquire(model, request.request_id, deadline, lost)
            replies = connection.replies(msgspec.structs.replace(request, deadline_s=deadline - time.monotonic()))
            try:
                async for reply, _ in replies:
                    assert isinstance(reply, Started | Delta | Finished)
                    if isinstance(reply, Started):
                        if announced:
                            continue
                        announced = True
                    begun = begun or isinstance(reply, Delta)
                    yield reply
                return
            except (ReplicaLostError, RequestRefused) as error:
                lost = self._try_elsewhere(error, request, connection, lost, begun=begun)
            finally:
                await replies.aclose()

    async def embed(self, model: str, request: Embed) -> tuple[Embedded, NDArray[np.float32]]:
        """One vector per input."""
        reply, buffers = await self._ask(model, request, request.deadline_s)
        assert isinstance(reply, Embedded)
        vectors = np.frombuffer(buffers[0], dtype=np.float32)
        return reply, vectors.reshape(reply.num_vectors, reply.dimensions)

    async def tokenize(self, model: str, request: Tokenize) -> Tokenized:
        """Token ids of a prompt."""
        reply, _ = await self._ask(model, request, _QUESTION_TIMEOUT_S)
        assert isinstance(reply, Tokenized)
        return reply

    async def detokenize(self, model: str, request: Detokenize) -> Detokenized:
        """Text of token ids."""
        reply, _ = await self._ask(model, request, _QUESTION_TIMEOUT_S)
        assert isinstance(reply, Detokenized)
        return reply

    async def _ask(self, model: str, request: Request, deadline_s: float) -> tuple[Reply, list[bytes]]:
        """One reply to one request; asked again elsewhere when the replica is lost (the answer is the same)."""
        deadline = time.monotonic() + deadline_s
        lost: frozenset[str] = frozenset()
        while True:
            connection = await self._acquire(model, request.request_id, deadline, lost)
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                    async with contextlib.aclosing(connection.replies(request)) as replies:
                        async for answer in replies:
                            return answer
                raise ReplicaLostError(f"replica {connection.replica_id} ended without an answer")
            except TimeoutError as error:
                raise _too_late(request.request_id, deadline_s) from error
            except (ReplicaLostError, RequestRefused) as error:
                lost = self._try_elsewhere(error, request, connection, lost, begun=False)

    async def _acquire(self, model: str, request_id: str, deadline: float, lost: frozenset[str]) -> ReplicaConnection:
        route = self.find(model)
        if route is None:
            message = f"model {model!r} is no longer served"
            raise RequestRefused(Refused(request_id=request_id, code="invalid_request", message=message))
        target = choose_target(route.targets, random.random())  # noqa: S311 - a traffic split, not a secret
        left_s = deadline - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                return await self._pools[target.app].acquire(lost)
        except TimeoutError as error:
            raise _too_late(request_id, left_s) from error

    def _try_elsewhere(
        self,
        error: ReplicaLostError | RequestRefused,
        request: Request,
        connection: ReplicaConnection,
        lost: frozenset[str],
        *,
        begun: bool,
    ) -> frozenset[str]:
        """The replicas to avoid in the next attempt; raises when there is to be none."""
        if isinstance(error, RequestRefused):
            if error.refused.code != "draining" or begun:
                raise error
        elif begun or len(lost) + 1 >= _MAX_ATTEMPTS:
            message = f"the replica was lost and the request could not be continued: {error}"
            raise RequestRefused(Refused(request_id=request.request_id, code="internal", message=message)) from error
        return lost | {connection.replica_id}

    async def close(self) -> None:
        """Close every pool."""
        for pool in self._pools.values():
            await pool.close()


def _too_late(request_id: str, seconds: float) -> RequestRefused:
    message = f"no replica answered within the request's deadline ({seconds:.1f} s left when it was asked)"
    return RequestRefused(Refused(request_id=request_id, code="deadline_exceeded", message=message))
