"""The embedding engine: requests enter, their inputs are batched across requests by length, vectors leave in order.

A batch is built around the input that has waited longest, from inputs of similar length, under a budget of padded
tokens (number of inputs x longest input). As many batches are in flight as the pipeline has stages.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy import float32
from numpy.typing import NDArray

from deployments.messages import (
    Embed,
    Embedded,
    EmbedInput,
    EmbedOutput,
    Load,
    RefusalCode,
    RequestRefused,
    StageFailed,
    refuse,
)
from deployments.replica.encode import PromptEncoder
from deployments.replica.life import EngineLife, OnStageFailure
from deployments.replica.link import EmbedLink
from deployments.replica.observe import EngineStats, MeanDuration
from deployments.replica.scheduler import StepMismatch
from deployments.replica.text import TextTokenizer
from deployments.stage.link import StageLostError

logger = logging.getLogger(__name__)

_WINDOW_BATCHES = 4  # a batch is chosen among this many batches' worth of waiting inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedConfig:
    """Limits of an embedding engine."""

    context_tokens: int
    """Longest input, special tokens included."""
    max_batch_tokens: int
    """Padded tokens of one batch; a single longer input is a batch of its own."""
    max_batch_items: int
    max_waiting: int
    """Requests that may be under way; one more is refused as overloaded."""
    on_stage_failure: OnStageFailure = "refuse"

    def __post_init__(self) -> None:
        """Raise ValueError for limits under which nothing could run."""
        for name in ("context_tokens", "max_batch_tokens", "max_batch_items", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(slots=True, eq=False)
class _Request:
    request_id: str
    arrived_s: float
    done: asyncio.Future[None]
    vectors: list[NDArray[float32] | None]
    num_missing: int
    is_suspect: bool = False
    """It took part in a batch that made a stage fail; its inputs are computed one by one from then on."""


@dataclass(slots=True, eq=False)
class _Item:
    request: _Request
    index: int
    token_ids: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Batch:
    step: int
    items: list[_Item] = field(default_factory=list)


def choose_batch(lengths: Sequence[int], *, max_tokens: int, max_items: int) -> list[int]:
    """Indices of the inputs to batch, always with index 0 (the oldest) among them.

    Grows around the oldest input in order of length, always to the side that pads less, while
    count x longest stays within ``max_tokens``.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    sums = [0, *accumulate(lengths[index] for index in order)]

    def padded(start: int, stop: int) -> int:
        return lengths[order[stop - 1]] * (stop - start)

    start = order.index(0)
    stop = start + 1
    while stop - start < max_items:
        wider = [
            (padded(begin, end) - (sums[end] - sums[begin]), begin, end)
            for begin, end in ((start - 1, stop), (start, stop + 1))
            if begin >= 0 and end <= len(order) and padded(begin, end) <= max_tokens
        ]
        if not wider:
            break
        _, start, stop = min(wider)
    return order[start:stop]


class EmbedEngine(EngineLife):
    """Serves Embed requests over one pipeline. Start, embed, drain, stop - in that order, in one event loop."""

    _lost_code = "draining"  # an embedding costs little, and another replica can do it

    def __init__(
        self,
        config: EmbedConfig,
        tokenizer: TextTokenizer,
        link: EmbedLink,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(config.on_stage_failure)
        self.config = config
        self._encoder = PromptEncoder(tokenizer, config.context_tokens)
        self._link = link
        self._clock = clock
        self._waiting: deque[_Item] = deque()
        self._in_flight: deque[_Batch] = deque()
        self._requests: dict[str, _Request] = {}
        self._reserved: set[str] = set()
        self._durations = MeanDuration()
        self._num_steps = self._num_results = 0
        self._num_done = self._num_refused = self._num_cancelled = 0

    async def stop(self) -> None:
        """End every request and all work; the link stays the caller's to close."""
        await super().stop()
        self._in_flight.clear()
        self._encoder.stop()

    async def recover(self, link: EmbedLink) -> None:
        """Go on over new stages: batches that were under way are computed again, before all others."""
        await self._cancel_tasks()
        for batch in reversed(self._in_flight):
            self._waiting.extendleft(item for item in reversed(batch.items) if not item.request.done.done())
        self._in_flight.clear()
        self._link = link
        await self._resume()

    async def embed(self, request: Embed) -> tuple[Embedded, NDArray[float32]]:
        """One vector per input, in their order, shape [num_inputs, dimensions]; raises RequestRefused.

        Cancelling the call takes the inputs that are not in a batch yet out of the queue.
        """
        arrived_s = self._clock()
        try:
            async with asyncio.timeout(request.deadline_s):
                return await self._embed(request, arrived_s)
        except TimeoutError as error:
            self._num_refused += 1
            message = f"the request was not done within {request.deadline_s:g} s"
            raise refuse(request.request_id, "deadline_exceeded", message) from error
        except RequestRefused:
            self._num_refused += 1
            raise
        except asyncio.CancelledError:
            self._num_cancelled += 1
            raise

    async def _embed(self, request: Embed, arrived_s: float) -> tuple[Embedded, NDArray[float32]]:
        self._check_open(request.request_id)
        self._reserved.add(request.request_id)
        try:
            inputs = await self._encoder.encode_inputs(request.inputs, request.request_id)
            self._check_usable(request.request_id)
            self._check_lengths(request.request_id, inputs)
            entered = self._enter(request.request_id, inputs, arrived_s)
            await entered.done
        finally:
            self._leave(request.request_id)
        self._num_done += 1
        self._durations.add(self._clock() - arrived_s)
        vectors = np.stack([vector for vector in entered.vectors if vector is not None])
        embedded = Embedded(
            request_id=request.request_id,
            num_vectors=vectors.shape[0],
            dimensions=vectors.shape[1],
            num_prompt_tokens=sum(len(token_ids) for token_ids in inputs),
        )
        return embedded, vectors

    def _check_open(self, request_id: str) -> None:
        self._check_usable(request_id)
        if request_id in self._reserved:
            raise refuse(request_id, "invalid_request", f"request id {request_id!r} is already in use")
        num_waiting = len(self._reserved)
        if num_waiting >= self.config.max_waiting:
            retry_after_s = self._durations.retry_after_s(num_waiting, self._link.num_stages)
            message = f"{num_waiting} requests are waiting, and no more may; try again later"
            raise refuse(request_id, "overloaded", message, retry_after_s=retry_after_s)

    def _check_lengths(self, request_id: str, inputs: Sequence[tuple[int, ...]]) -> None:
        if not inputs:
            raise refuse(request_id, "invalid_request", "input is empty; send at least one text", param="input")
        for index, token_ids in enumerate(inputs):
            if len(token_ids) > self.config.context_tokens:
                message = (
                    f"this model's context is {self.config.context_tokens} tokens, but input {index} has "
                    f"{len(token_ids)}; shorten it"
                )
                raise refuse(request_id, "context_length_exceeded", message, param="input")

    def _enter(self, request_id: str, inputs: Sequence[tuple[int, ...]], arrived_s: float) -> _Request:
        done = asyncio.get_running_loop().create_future()
        request = _Request(request_id, arrived_s, done, [None] * len(inputs), len(inputs))
        self._requests[request_id] = request
        self._idle.clear()
        self._waiting.extend(_Item(request, index, token_ids) for index, token_ids in enumerate(inputs))
        self._wake.set()
        return request

    def _leave(self, request_id: str) -> None:
        self._reserved.discard(request_id)
        request = self._requests.pop(request_id, None)
        if request is not None and request.num_missing:
            self._waiting = deque(item for item in self._waiting if item.request is not request)
        if not self._requests:
            self._idle.set()

    def _refuse_all(self, code: RefusalCode, message: str) -> None:
        self._waiting.clear()
        for request in self._requests.values():
            if not request.done.done():
                request.done.set_exception(refuse(request.request_id, code, message))

    async def _pump(self) -> None:
        while self.failed is None:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting and len(self._in_flight) < self._link.num_stages:
                batch = self._take_batch()
                self._in_flight.append(batch)
                self._sent.set()
                inputs = tuple(item.token_ids for item in batch.items)
                await self._link.send(EmbedInput(step=batch.step, inputs=inputs))

    def _take_batch(self) -> _Batch:
        window = list(self._waiting)[: self.config.max_batch_items * _WINDOW_BATCHES]
        if window[0].request.is_suspect:
            chosen = [0]
        else:
            chosen = choose_batch(
                [len(item.token_ids) for item in window],
                max_tokens=self.config.max_batch_tokens,
                max_items=self.config.max_batch_items,
            )
        for index in sorted(chosen, reverse=True):
            del self._waiting[index]
        self._num_steps += 1
        return _Batch(self._num_steps, [window[index] for index in chosen])

    async def _receive_outputs(self) -> None:
        while True:
            while not self._in_flight:
                await self._sent.wait()
                self._sent.clear()
            output, buffers = await self._link.receive_vectors()
            if isinstance(output, StageFailed):
                if not output.misheard:
                    self._blame(output)
                raise StageLostError(None, f"step {output.step} failed: {output.message}")
            self._take(output, buffers)
            self._wake.set()

    def _blame(self, failed: StageFailed) -> None:
        """An input that fails by itself, too, ends its request; or it would break every repair."""
        items = self._in_flight[0].items
        for request in {item.request for item in items}:
            request.is_suspect = True
            if len(items) == 1 and not request.done.done():
                message = f"an input of this request made a stage fail twice, the last time so: {failed.message}"
                request.done.set_exception(refuse(request.request_id, "internal", message))

    def _take(self, output: EmbedOutput, buffers: list[bytes]) -> None:
        batch = self._in_flight[0]
        if output.step != batch.step or output.num_vectors != len(batch.items) or len(buffers) != 1:
            raise StepMismatch(
                f"the last stage answered step {output.step} with {output.num_vectors} vectors; expected "
                f"{len(batch.items)} of step {batch.step}"
            )
        self._in_flight.popleft()
        self._num_results += 1
        vectors = np.frombuffer(buffers[0], dtype=float32).reshape(output.num_vectors, output.dimensions)
        for item, vector in zip(batch.items, vectors, strict=True):
            request = item.request
            request.vectors[item.index] = vector
            request.num_missing -= 1
            if request.num_missing == 0 and not request.done.done():
                request.done.set_result(None)

    def load(self) -> Load:
        """How busy this replica is: batches in flight, inputs waiting."""
        return Load(
            num_running=sum(len(batch.items) for batch in self._in_flight),
            num_waiting=len(self._waiting),
            num_waiting_tokens=sum(len(item.token_ids) for item in self._waiting),
            kv_used_fraction=0.0,
            draining=self._draining or (self.failed is not None and self.config.on_stage_failure == "refuse"),
        )

    def stats(self) -> EngineStats:
        """Totals so far, and what is held now."""
        return EngineStats(
            num_steps=self._num_steps,
            num_recoveries=self._num_recoveries,
            num_results=self._num_results,
            num_requests_done=self._num_done,
            num_requests_refused=self._num_refused,
            num_requests_cancelled=self._num_cancelled,
            num_running=sum(len(batch.items) for batch in self._in_flight),
            num_waiting=len(self._waiting),
        )
