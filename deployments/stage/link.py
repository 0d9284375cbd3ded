"""The replica's end of the pipeline: steps go to every stage, results come back from the last."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from deployments.channel import Channel, ChannelError
from deployments.frames import encode
from deployments.messages import EmbedInput, EmbedOutput, Opened, StageFailed, StepInput, StepOutput
from deployments.stage.compact import StepCompactor


@dataclass(frozen=True, slots=True, kw_only=True)
class StageAddress:
    """Where a stage listens, and the secret that it accepts."""

    address: str
    secret: bytes = field(repr=False)


class StageLostError(Exception):
    """A stage died, was cut off, or did not answer in time; ``stage`` is its index, None when it is not known."""

    def __init__(self, stage: int | None, reason: str) -> None:
        super().__init__(stage, reason)
        self.stage = stage
        self.reason = reason

    def __str__(self) -> str:
        """Which stage, and why."""
        return f"stage {self.stage} is lost: {self.reason}" if self.stage is not None else self.reason


StageResult = StepOutput | EmbedOutput | StageFailed


class StageLink:
    """Channels to all stages of one replica. ``receive`` is for one task at a time."""

    def __init__(self, channels: Sequence[Channel], step_timeout_s: float) -> None:
        self._channels = list(channels)
        self._step_timeout_s = step_timeout_s
        self._compactor = StepCompactor()
        self._num_unanswered = 0
        self._results: asyncio.Queue[tuple[StageResult, list[bytes]] | StageLostError] = asyncio.Queue()
        self._lost: asyncio.Future[StageLostError] = asyncio.get_running_loop().create_future()
        self._readers = [
            asyncio.create_task(self._read(index, channel)) for index, channel in enumerate(self._channels)
        ]

    @classmethod
    async def connect(cls, stages: Sequence[StageAddress], *, step_timeout_s: float) -> "StageLink":
        """Connect to every stage in order; raises StageLostError naming the one that is not there."""
        channels: list[Channel] = []
        for index, stage in enumerate(stages):
            try:
                channel = await Channel.connect(stage.address, stage.secret)
                await channel.send(Opened(role="replica"))
            except ChannelError as error:
                for opened in channels:
                    opened.close()
                raise StageLostError(index, str(error)) from error
            channels.append(channel)
        return cls(channels, step_timeout_s)

    @property
    def num_stages(self) -> int:
        """Length of the pipeline."""
        return len(self._channels)

    async def send(self, step: StepInput | EmbedInput) -> None:
        """Hand a step to every stage; raises StageLostError."""
        follows = self._num_unanswered > 0
        message = self._compactor.compact(step, follows=follows) if isinstance(step, StepInput) else step
        frame = encode(message)
        self._num_unanswered += 1
        for index, channel in enumerate(self._channels):
            try:
                channel.send_encoded(frame)
                await channel.drain()
            except ChannelError as error:
                raise StageLostError(index, str(error)) from error

    async def receive(self) -> StepOutput | StageFailed:
        """The next step's result, in the order sent; raises StageLostError, also when the deadline passes."""
        result, _ = await self._next_result()
        if isinstance(result, EmbedOutput):
            raise TypeError("a generating stage answered with vectors")
        return result

    async def receive_vectors(self) -> tuple[EmbedOutput | StageFailed, list[bytes]]:
        """The next batch's vectors and their buffer; raises StageLostError."""
        result, buffers = await self._next_result()
        if isinstance(result, StepOutput):
            raise TypeError("an embedding stage answered with samples")
        return result, buffers

    async def _next_result(self) -> tuple[StageResult, list[bytes]]:
        try:
            async with asyncio.timeout(self._step_timeout_s):
                result = await self._results.get()
        except TimeoutError as error:
            raise StageLostError(None, f"no stage answered within {self._step_timeout_s:g} s") from error
        if isinstance(result, StageLostError):
            raise result
        self._num_unanswered -= 1
        return result

    async def _read(self, index: int, channel: Channel) -> None:
        while True:
            try:
                message, buffers = await channel.receive()
            except ChannelError as error:
                self._lose(StageLostError(index, str(error)))
                return
            if isinstance(message, StepOutput | EmbedOutput | StageFailed):
                self._results.put_nowait((message, buffers))
            else:
                self._lose(StageLostError(index, f"it sent a {type(message).__name__}"))
                return

    def _lose(self, loss: StageLostError) -> None:
        self._results.put_nowait(loss)
        if not self._lost.done():
            self._lost.set_result(loss)

    async def wait_lost(self) -> StageLostError:
        """Return, as soon as a connection breaks, which and why; also while no step is under way."""
        return await asyncio.shield(self._lost)

    async def close(self) -> None:
        """Close every connection; the stages stop serving."""
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        for channel in self._channels:
            channel.close()
