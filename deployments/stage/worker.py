"""A stage's loop: steps and hidden states come in over channels, hidden states or samples go out. No Ray.

Started, then wired, then it serves until it is stopped or fails: the replica connects as ``replica``, the stage
before connects as ``previous_stage``, and this stage connects to the one after. Steps are computed strictly in the
order in which the replica sent them. Computing happens on one thread of its own, so that the event loop keeps
moving bytes meanwhile.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from deployments.channel import Buffer, Channel, ChannelClosed, ChannelError, Listener
from deployments.messages import (
    EmbedInput,
    EmbedOutput,
    Hidden,
    Opened,
    Sample,
    StageFailed,
    StageTiming,
    StepInput,
    StepOutput,
)

logger = logging.getLogger(__name__)


class StepRunner(Protocol):
    """A slice of a generating model; see :class:`deployments.runtime.runner.StageRunner`."""

    hidden_size: int
    dtype: torch.dtype

    def run(self, step: StepInput, hidden: torch.Tensor | None) -> torch.Tensor | list[Sample]:
        """Compute one step."""


class EmbedRunner(Protocol):
    """A whole embedding model; see :class:`deployments.runtime.encoder.EncoderRunner`."""

    def embed(self, inputs: tuple[tuple[int, ...], ...]) -> np.ndarray:
        """One float32 vector per input, shape [len(inputs), dimensions]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePosition:
    """Where a stage stands in its pipeline."""

    index: int
    is_first: bool
    is_last: bool


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
        self._listener = Listener(self._accept)
        self._compute = ThreadPoolExecutor(1, thread_name_prefix=f"stage-{position.index}")
        self._replica: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        self._previous: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        self._next: Channel | None = None
        self._finished = asyncio.Event()

    async def start(self, host: str) -> tuple[str, bytes]:
        """Listen on a free port of ``host``; returns the address and the secret that connects to it."""
        return await self._listener.start(host), self._listener.secret

    async def connect_next(self, address: str, secret: bytes) -> None:
        """Connect to the stage after this one; raises a ChannelError when it is not there."""
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
        step = -1
        try:
            while True:
                begin = time.perf_counter()
                message, _ = await replica.receive()
                if isinstance(message, StepInput):
                    step = message.step
                    await self._step(message, replica, begin)
                elif isinstance(message, EmbedInput):
                    step = message.step
                    await self._embed(message, replica)
                else:
                    raise TypeError(f"a stage was sent a {type(message).__name__}")
        except ChannelClosed:
            return
        except Exception as error:
            await _report(replica, StageFailed(step=step, message=f"stage {self._position.index}: {error!r}"))
            raise
        finally:
            await self.stop()

    async def _step(self, step: StepInput, replica: Channel, begin: float) -> None:
        for start in step.started:
            extra = {"request_id": start.request_id, "sequence_id": start.sequence_id, "step": step.step}
            logger.info("sequence starts with %d tokens", len(start.token_ids), extra=extra)
        hidden = None if self._position.is_first else await self._receive_hidden(step.step)
        received = time.perf_counter()
        result = await asyncio.get_running_loop().run_in_executor(
            self._compute,
            self._runner.run,  # type: ignore[union-attr]
            step,
            hidden,
        )
        computed = time.perf_counter()
        timing = StageTiming(self._position.index, received - begin, computed - received, 0.0)
        if isinstance(result, torch.Tensor):
            assert self._next is not None, "a stage before the last is wired before it serves"
            await self._next.send(describe_hidden(step.step, result), [tensor_bytes(result)])
        else:
            await replica.send(StepOutput(step=step.step, samples=tuple(result), timing=timing))
        sent_s = time.perf_counter() - computed
        self._on_step(StageTiming(timing.stage, timing.wait_s, timing.compute_s, sent_s))

    async def _receive_hidden(self, step: int) -> torch.Tensor:
        previous = await self._previous
        message, buffers = await previous.receive()
        if not isinstance(message, Hidden) or message.step != step or len(buffers) != 1:
            raise ValueError(f"stage {self._position.index} expected the activations of step {step}, got {message}")
        return restore_hidden(message, buffers[0])

    async def _embed(self, batch: EmbedInput, replica: Channel) -> None:
        vectors = await asyncio.get_running_loop().run_in_executor(
            self._compute,
            self._runner.embed,  # type: ignore[union-attr]
            batch.inputs,
        )
        output = EmbedOutput(step=batch.step, num_vectors=vectors.shape[0], dimensions=vectors.shape[1])
        await replica.send(output, [vectors.tobytes()])

    async def stop(self) -> None:
        """Close every connection (the replica sees it at once), and wait for the step that is being computed."""
        self._finished.set()
        for expected in (self._replica, self._previous):
            expected.cancel()  # whoever has not connected by now never will
        if self._next is not None:
            self._next.close()
        await self._listener.stop()
        await asyncio.to_thread(self._compute.shutdown, wait=True, cancel_futures=True)


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
