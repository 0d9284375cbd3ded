"""A stage at work: steps and hidden states come in over channels, hidden states or samples go out. No Ray.

Started, then wired, then it serves until it is stopped or fails: the replica connects as ``replica``, and where there
are several stages they form a ring: each connects to the next as ``previous_stage``, the last to the first. Steps are
computed strictly in the order in which the replica sent them.

Computing happens on one thread of its own, which takes its steps from a queue and does not wait for its results to
be sent: the event loop fills the queue and empties the results while the thread computes, so that between two steps
that are at hand nothing is done but to begin the second.

A step may ask for the token that an earlier one chose. With one stage that is known here; otherwise the last stage
tells the first in a :class:`Chosen` after every step that samples.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np
import torch

from deployments.channel import Channel, ChannelClosed, ChannelCorrupt, ChannelError, Listener
from deployments.frames import Buffer
from deployments.messages import (
    Alive,
    AnyMessage,
    Chosen,
    CompactStep,
    EmbedInput,
    EmbedOutput,
    Hidden,
    Opened,
    Sample,
    SequenceStep,
    StageFailed,
    StageTiming,
    StepInput,
    StepOutput,
)
from deployments.stage.compact import StepExpander

logger = logging.getLogger(__name__)

_ALIVE_PERIOD_S = 0.5
_KEPT_STEPS = 64  # choices are kept for so many sampling steps; those in flight are far fewer
_UNREAD = 0  # stands for a token id where a stage only counts tokens


class StepRunner(Protocol):
    """A slice of a generating model; see :class:`deployments.runtime.runner.StageRunner`."""

    def run(self, step: StepInput, hidden: torch.Tensor | None) -> torch.Tensor | list[Sample]:
        """Compute one step. Stages after the first read only the number of its tokens.

        A tensor that it returns must not be written to afterwards: it is sent while the next step is computed.
        """


class EmbedRunner(Protocol):
    """A whole model of vectors; see :mod:`deployments.runtime.encoder` and :mod:`deployments.runtime.classifier`."""

    def embed(self, inputs: tuple[tuple[int, ...], ...]) -> np.ndarray:
        """One float32 vector per input, shape [len(inputs), dimensions]; a classifier's are probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePosition:
    """Where a stage stands in its pipeline."""

    index: int
    is_first: bool
    is_last: bool


class _MisheardError(Exception):
    """What the stage before sent was altered or cut short on its way."""


class StageWorker:
    """Serves one runner over channels; see the module's docstring for its life."""

    def __init__(
        self,
        runner: StepRunner | EmbedRunner,
        position: StagePosition,
        on_step: Callable[[StageTiming], None] = lambda _: None,
    ) -> None:
        self._runner = runner
        self._position = position
        self._on_step = on_step
        self._loop = asyncio.get_running_loop()
        self._listener = Listener(self._accept)
        self._compute = ThreadPoolExecutor(1, thread_name_prefix=f"stage-{position.index}")
        self._replica: asyncio.Future[Channel] = self._loop.create_future()
        self._previous: asyncio.Future[Channel] = self._loop.create_future()
        self._next: Channel | None = None
        self._finished = asyncio.Event()
        self._steps: SimpleQueue[CompactStep | EmbedInput | Exception] = SimpleQueue()
        self._inputs: SimpleQueue[tuple[Hidden | Chosen, list[bytes]] | Exception] = SimpleQueue()
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving = False
        # What follows belongs to the computing thread.
        self._step = -1
        self._expander = StepExpander()
        self._chosen: dict[int, dict[int, int]] = {}
        self._idle_since = 0.0

    async def start(self, host: str) -> tuple[str, bytes]:
        """Listen on a free port of ``host``; returns the address and the secret that connects to it."""
        return await self._listener.start(host), self._listener.secret

    async def connect_next(self, address: str, secret: bytes) -> None:
        """Connect to the stage after this one, or from the last to the first; raises a ChannelError without it."""
        self._next = await Channel.connect(address, secret)
        await self._next.send(Opened(role="previous_stage"))

    async def _accept(self, channel: Channel) -> None:
        opened, _ = await channel.receive(timeout_s=10.0)
        if not isinstance(opened, Opened) or opened.role == "gateway":
            return
        waiting = self._replica if opened.role == "replica" else self._previous
        if waiting.done():
            return  # the place is taken: this stage belongs to one replica for life
        waiting.set_result(channel)
        await self._finished.wait()

    async def serve(self) -> None:
        """Compute steps until a neighbour closes its connection, or :meth:`stop`; any other end raises its reason.

        A step that fails is reported to the replica as :class:`StageFailed` before the error is raised.
        """
        await asyncio.wait((self._replica,))
        if self._replica.cancelled():
            return
        replica = self._replica.result()
        work = (self._read_steps(replica), self._read_inputs(), _tell_alive(replica))
        self._tasks = [asyncio.create_task(part) for part in work]
        try:
            await self._loop.run_in_executor(self._compute, self._work, replica)
        except _MisheardError as error:
            message = f"stage {self._position.index}: {error}"
            await _report(replica, StageFailed(step=self._step, message=message, misheard=True))
        except ChannelError as error:
            logger.info("stage %d stops serving: %s", self._position.index, error)
        except Exception as error:
            await _report(replica, StageFailed(step=self._step, message=f"stage {self._position.index}: {error!r}"))
            raise
        finally:
            await self.stop()

    # --- on the event loop ---

    async def _read_steps(self, replica: Channel) -> None:
        try:
            while True:
                message, _ = await replica.receive()
                if not isinstance(message, CompactStep | EmbedInput):
                    raise TypeError(f"a stage was sent a {type(message).__name__}")
                self._steps.put(message)
        except (ChannelError, TypeError) as error:
            self._leave(error)

    async def _read_inputs(self) -> None:
        expected = Chosen if self._position.is_first else Hidden
        try:
            previous = await self._previous
            while True:
                message, buffers = await previous.receive()
                if not isinstance(message, expected):
                    raise TypeError(f"the previous stage sent a {type(message).__name__}")
                self._inputs.put((message, buffers))
        except ChannelCorrupt as error:
            self._leave(_MisheardError(str(error)))
        except (ChannelError, TypeError) as error:
            self._leave(error)

    def _leave(self, error: Exception) -> None:
        """Nothing that is computed from here on will reach anybody."""
        self._leaving = True
        self._steps.put(error)
        self._inputs.put(error)

    def _send(self, messages: list[tuple[Channel, AnyMessage, list[Buffer]]], timing: StageTiming) -> None:
        """Hand a step's results over. Few can pile up: the replica has few steps in flight."""
        begin = time.perf_counter()
        try:
            for channel, message, buffers in messages:
                channel.send_nowait(message, buffers)
        except ChannelError as error:
            self._leave(error)
            return
        sent_s = time.perf_counter() - begin
        self._on_step(StageTiming(timing.stage, timing.wait_s, timing.compute_s, sent_s, timing.bubble_s))

    # --- on the computing thread ---

    def _work(self, replica: Channel) -> None:
        """Compute what is queued, until the connections end; raises why."""
        self._idle_since = time.perf_counter()
        while True:
            step = self._steps.get()
            if isinstance(step, Exception):
                raise step
            if self._leaving:
                continue  # the reason is in the queue
            self._step = step.step
            if isinstance(step, CompactStep):
                self._run(step, replica)
            else:
                self._embed(step, replica)

    def _run(self, compact: CompactStep, replica: Channel) -> None:
        _log_started(compact)
        got = time.perf_counter()
        step = self._resolve(self._expander.expand(compact))
        hidden = None if self._position.is_first else self._take_hidden(step.step)
        begin = time.perf_counter()
        result = self._runner.run(step, hidden)  # type: ignore[union-attr]
        end = time.perf_counter()
        bubble_s = begin - (self._idle_since if compact.follows else got)
        timing = StageTiming(self._position.index, begin - self._idle_since, end - begin, 0.0, bubble_s)
        self._idle_since = end
        self._post(self._messages(step.step, result, timing, replica), timing)

    def _messages(
        self, step: int, result: torch.Tensor | list[Sample], timing: StageTiming, replica: Channel
    ) -> list[tuple[Channel, AnyMessage, list[Buffer]]]:
        """What a step's result says, and to whom."""
        if isinstance(result, torch.Tensor):
            assert self._next is not None, "a stage before the last is wired before it serves"
            return [(self._next, describe_hidden(step, result), [tensor_bytes(result)])]
        messages: list[tuple[Channel, AnyMessage, list[Buffer]]] = []
        if result and self._position.is_first:
            self._note(step, {sample.sequence_id: sample.token_id for sample in result})
        elif result:
            assert self._next is not None, "the last stage is wired to the first before it serves"
            tokens = tuple([(sample.sequence_id, sample.token_id) for sample in result])
            messages.append((self._next, Chosen(step=step, tokens=tokens), []))
        messages.append((replica, StepOutput(step=step, samples=tuple(result), timing=timing), []))
        return messages

    def _resolve(self, step: StepInput) -> StepInput:
        """The step with the tokens that earlier ones chose in their places."""
        if self._position.is_first and not self._position.is_last:
            self._take_chosen(wanted=max((part.chosen_in or 0 for part in step.sequences), default=0))
        if all(part.chosen_in is None for part in step.sequences):
            return step
        return StepInput(
            step=step.step,
            sequences=tuple([self._resolve_part(part) for part in step.sequences]),
            started=step.started,
            ended=step.ended,
        )

    def _resolve_part(self, part: SequenceStep) -> SequenceStep:
        if part.chosen_in is None:
            return part
        token_id = self._chosen[part.chosen_in][part.sequence_id] if self._position.is_first else _UNREAD
        return SequenceStep(
            part.sequence_id, (token_id,), part.position, part.block_ids, part.sample, None, part.adapter
        )

    def _take_chosen(self, wanted: int) -> None:
        """Note what the last stage chose so far; wait for step ``wanted`` if there is one and it is not known yet."""
        while True:
            try:
                message, _ = self._take_input(block=wanted > 0 and wanted not in self._chosen)
            except Empty:
                return
            assert isinstance(message, Chosen), "the reader lets nothing else through to a first stage"
            self._note(message.step, dict(message.tokens))

    def _note(self, step: int, tokens: dict[int, int]) -> None:
        self._chosen[step] = tokens
        if len(self._chosen) > _KEPT_STEPS:
            del self._chosen[next(iter(self._chosen))]

    def _take_hidden(self, step: int) -> torch.Tensor:
        message, buffers = self._take_input(block=True)
        if not isinstance(message, Hidden) or message.step != step or len(buffers) != 1:
            raise ValueError(f"stage {self._position.index} expected the activations of step {step}, got {message}")
        return restore_hidden(message, buffers[0])

    def _take_input(self, *, block: bool) -> tuple[Hidden | Chosen, list[bytes]]:
        taken = self._inputs.get(block=block)
        if isinstance(taken, Exception):
            raise taken
        return taken

    def _embed(self, batch: EmbedInput, replica: Channel) -> None:
        begin = time.perf_counter()
        vectors = self._runner.embed(batch.inputs)  # type: ignore[union-attr]
        timing = StageTiming(
            self._position.index, begin - self._idle_since, time.perf_counter() - begin, 0.0, bubble_s=0.0
        )
        self._idle_since = time.perf_counter()
        output = EmbedOutput(step=batch.step, num_vectors=vectors.shape[0], dimensions=vectors.shape[1])
        self._post([(replica, output, [vectors.tobytes()])], timing)

    def _post(self, messages: list[tuple[Channel, AnyMessage, list[Buffer]]], timing: StageTiming) -> None:
        self._loop.call_soon_threadsafe(partial(self._send, messages, timing))

    # --- the end ---

    async def stop(self) -> None:
        """Close every connection (the replica sees it at once), and wait for the step that is being computed."""
        self._finished.set()
        self._leave(ChannelClosed("the stage was stopped"))
        for expected in (self._replica, self._previous):
            expected.cancel()  # whoever has not connected by now never will
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._next is not None:
            self._next.close()
        await self._listener.stop()
        await asyncio.to_thread(self._compute.shutdown, wait=True, cancel_futures=True)


def _log_started(step: CompactStep) -> None:
    for start in step.started:
        extra = {"request_id": start.request_id, "sequence_id": start.sequence_id, "step": step.step}
        logger.info("sequence starts with %d tokens", len(start.token_ids), extra=extra)


async def _tell_alive(replica: Channel) -> None:
    with suppress(ChannelError):
        while True:
            await replica.send(Alive())
            await asyncio.sleep(_ALIVE_PERIOD_S)


async def _report(replica: Channel, failure: StageFailed) -> None:
    try:
        await replica.send(failure)
    except ChannelError:
        return  # the replica is gone: nobody is left to tell


def describe_hidden(step: int, hidden: torch.Tensor) -> Hidden:
    """The header of activations [num_tokens, hidden_size]."""
    return Hidden(
        step=step,
        num_tokens=hidden.shape[0],
        hidden_size=hidden.shape[1],
        dtype=str(hidden.dtype).removeprefix("torch."),
    )


def tensor_bytes(tensor: torch.Tensor) -> Buffer:
    """The tensor's memory as bytes (no copy when it is contiguous and on the CPU)."""
    return tensor.contiguous().cpu().view(torch.uint8).numpy().data


def restore_hidden(header: Hidden, buffer: bytes) -> torch.Tensor:
    """Activations from the wire; ValueError when the bytes are not what the header says."""
    dtype = getattr(torch, header.dtype)
    expected = header.num_tokens * header.hidden_size * dtype.itemsize
    if len(buffer) != expected:
        raise ValueError(f"activations of step {header.step} have {len(buffer)} bytes, expected {expected}")
    return torch.frombuffer(bytearray(buffer), dtype=dtype).view(header.num_tokens, header.hidden_size)
