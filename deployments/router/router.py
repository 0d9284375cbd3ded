"""The gateway's backend: model name -> application -> replica -> its replies."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cluster.plan.types import Route, RoutingTable
from deployments.gateway.backend import Event, Health, ModelHealth
from deployments.messages import (
    Classified,
    Classify,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    Generate,
    RequestRefused,
    Tokenize,
    Tokenized,
    refuse,
)
from deployments.router.choose import choose_target
from deployments.router.connection import ReplicaConnection, ReplicaLeaving, ReplicaLostError, Reply, Request
from deployments.router.pool import NoReplicaError, ReplicaPool
from deployments.router.progress import Losses, StreamProgress

logger = logging.getLogger(__name__)

# A tokenizer question carries no deadline of its own.
_QUESTION_TIMEOUT_S = 30.0
_FULL_S = 0.25


class Router:
    """Implements the gateway's ``Backend`` over connections to replicas."""

    def __init__(
        self,
        table: RoutingTable,
        open_pool: Callable[[str], ReplicaPool],
        on_hand_over: Callable[[str, str], None] = lambda model, cause: None,  # noqa: ARG005 - nobody counts
    ) -> None:
        """``on_hand_over`` is told the model, and ``lost`` or ``draining``, when a begun stream leaves a replica."""
        self._on_hand_over = on_hand_over
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
        """Route by ``table`` from now on; requests already under way stay with their version."""
        self._table = table
        wanted = {target.app for route in table.routes for target in route.targets}
        for app in wanted - self._pools.keys():
            self._pools[app] = self._open_pool(app)
        for app in self._pools.keys() - wanted:
            task = asyncio.create_task(self._pools.pop(app).close_when_unused())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def find(self, model: str) -> Route | None:
        """The route that serves ``model``."""
        return next((route for route in self._table.routes if route.model == model), None)

    def health(self) -> Health:
        """``starting`` while no model can be asked; one that lacks its replicas takes no other one out of service.

        A model that may have no replicas can always be asked: a request wakes it.
        """
        routes = self._table.routes
        models = tuple(self._model_health(route) for route in routes)
        can_answer = [
            bool(model.num_replicas) or not route.min_replicas for model, route in zip(models, routes, strict=True)
        ]
        return Health(status="ok" if any(can_answer) or not routes else "starting", models=models)

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
        """Events of one request, whichever replicas produce them.

        When a replica is lost, stops or drains, another one goes on after the tokens that were yielded; with none
        there, the request waits for one. Once begun, only replicas that produce the same tokens take part.
        """
        deadline = time.monotonic() + request.deadline_s
        progress, attempt = StreamProgress(request), Attempt()
        while not progress.is_complete:
            pool = self._pool_of(model, request.request_id) if attempt.pool is None else attempt.pool
            with pool.lease():
                connection = await self._acquire(pool, request.request_id, deadline, attempt)
                replies = connection.replies(
                    progress.request(deadline - time.monotonic()), partial(pool.has_other, connection)
                )
                try:
                    async for reply, _ in replies:
                        assert isinstance(reply, Event)
                        event = progress.note(reply)
                        if event is not None:
                            yield event
                    return
                except (ReplicaLeaving, ReplicaLostError, RequestRefused) as error:
                    attempt.note_failure(error, request.request_id, connection, progress.num_tokens)
                    if not isinstance(error, RequestRefused):
                        progress.note_place()
                    if progress.is_started:
                        attempt.stay_with(pool, connection.produces)
                        self._on_hand_over(model, "lost" if isinstance(error, ReplicaLostError) else "draining")
                finally:
                    await replies.aclose()
        yield progress.finish()

    async def embed(self, model: str, request: Embed) -> tuple[Embedded, NDArray[np.float32]]:
        """One vector per input."""
        reply, buffers = await self._ask(model, request, request.deadline_s)
        assert isinstance(reply, Embedded)
        vectors = np.frombuffer(buffers[0], dtype=np.float32)
        return reply, vectors.reshape(reply.num_vectors, reply.dimensions)

    async def classify(self, model: str, request: Classify) -> tuple[Classified, NDArray[np.float32]]:
        """The probability of every label for each input."""
        reply, buffers = await self._ask(model, request, request.deadline_s)
        assert isinstance(reply, Classified)
        probabilities = np.frombuffer(buffers[0], dtype=np.float32)
        return reply, probabilities.reshape(reply.num_inputs, len(reply.labels))

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
        attempt = Attempt()
        while True:
            pool = self._pool_of(model, request.request_id)
            with pool.lease():
                connection = await self._acquire(pool, request.request_id, deadline, attempt)
                try:
                    async with asyncio.timeout(deadline - time.monotonic()):
                        async with contextlib.aclosing(connection.replies(request)) as replies:
                            async for answer in replies:
                                return answer
                    raise ReplicaLostError(f"replica {connection.replica_id} ended without an answer")
                except TimeoutError as error:
                    raise _too_late(request.request_id, deadline_s) from error
                except (ReplicaLostError, RequestRefused) as error:
                    is_full = isinstance(error, RequestRefused) and error.refused.code == "overloaded"
                    if not (is_full and attempt.avoid):
                        attempt.note_failure(error, request.request_id, connection, 0)
                        continue
            await asyncio.sleep(_FULL_S)  # it had its place on a replica that is gone, and waits for another one

    def _pool_of(self, model: str, request_id: str) -> ReplicaPool:
        """The replicas that a new request goes to."""
        route = self.find(model)
        if route is None:
            raise refuse(request_id, "model_not_found", f"The model {model!r} is no longer served.")
        target = choose_target(route.targets, random.random())  # noqa: S311 - a traffic split, not a secret
        return self._pools[target.app]

    async def _acquire(
        self, pool: ReplicaPool, request_id: str, deadline: float, attempt: "Attempt"
    ) -> ReplicaConnection:
        left_s = deadline - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                return await pool.acquire(attempt.avoid, attempt.produces)
        except TimeoutError as error:
            raise _too_late(request_id, left_s) from error
        except NoReplicaError as error:
            raise refuse(request_id, "draining", f"the request could not be finished: {error}") from error

    async def close(self) -> None:
        """Close every pool."""
        for task in tuple(self._closing):
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        for pool in self._pools.values():
            await pool.close()


class Attempt:
    """Where one request has been, and where it may go next."""

    def __init__(self) -> None:
        self.pool: ReplicaPool | None = None
        """The only replicas that can go on, once the request has begun."""
        self.produces: str | None = None
        self.avoid: frozenset[str] = frozenset()
        self._losses = Losses()

    def note_failure(
        self,
        error: ReplicaLeaving | ReplicaLostError | RequestRefused,
        request_id: str,
        connection: ReplicaConnection,
        num_tokens: int,
    ) -> None:
        """A replica will not finish the request; raises RequestRefused when no other one is to try."""
        self.avoid |= {connection.replica_id}
        if isinstance(error, RequestRefused):
            if error.refused.code != "draining":
                raise error
            connection.note_draining()
        elif isinstance(error, ReplicaLostError):
            logger.warning("request %s goes on elsewhere: %s", request_id, error, extra={"request_id": request_id})
            reason = self._losses.count(num_tokens)
            if reason is not None:
                raise refuse(request_id, "internal", f"{reason}; it is not tried again") from error

    def stay_with(self, pool: ReplicaPool, produces: str) -> None:
        """The client has been told something: only replicas of the same make may go on."""
        self.pool, self.produces = pool, produces


def _too_late(request_id: str, seconds: float) -> RequestRefused:
    message = f"no replica answered within the request's deadline ({seconds:.1f} s left when it was asked)"
    return refuse(request_id, "deadline_exceeded", message)
