"""The replica's end of the pipeline: steps go to every stage, results come back from the last."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from deployments.channel import Channel, ChannelCorrupt, ChannelError
from deployments.frames import encode
from deployments.messages import Alive, EmbedInput, EmbedOutput, Opened, StageFailed, StepInput, StepOutput
from deployments.stage.compact import StepCompactor
from deployments.stage.deadline import StepDeadline

SILENCE_S = 5.0
"""A stage tells that it lives twice a second; one that is silent for so long stands still, or its node is gone."""

_WATCH_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class StageAddress:
    """Where a stage listens, and the secret that it accepts; and its process, for the day it must be ended."""

    address: str
    secret: bytes = field(repr=False)
    node_id: str = ""
    pid: int | None = None
    process_started_at: float = 0.0
    """Unix time, seconds: a process id alone may come to mean another process."""
    load_s: float = 0.0
    """How long the weights took, when they were loaded for this."""


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
    """Channels to all stages of one replica. ``receive`` is for one task at a time.

    A stage that dies is seen at once, by its connection. One that stands still - its process stopped, its node gone -
    is seen by its silence, and one that lives but computes for ever by the step's deadline.
    """

    def __init__(self, channels: Sequence[Channel], step_timeout_s: float, silence_s: float) -> None:
        self.suspects: set[int] = set()
        """Stages that must be replaced even if they answer."""
        self._channels = list(channels)
        self._compactor = StepCompactor()
        self._silence_s = silence_s
        self._deadline = StepDeadline(step_timeout_s)
        self._loop = asyncio.get_running_loop()
        self._heard_s = [self._loop.time()] * len(self._channels)
        self._awaited: deque[tuple[int, float]] = deque()
        """Size of each step in flight, and when it was sent."""
        self._answered_s = 0.0
        self._results: asyncio.Queue[tuple[StageResult, list[bytes]] | StageLostError] = asyncio.Queue()
        self._lost: asyncio.Future[StageLostError] = self._loop.create_future()
        self._tasks = [asyncio.create_task(self._read(index, channel)) for index, channel in enumerate(channels)]
        self._tasks.append(asyncio.create_task(self._watch()))

    @classmethod
    async def connect(
        cls, stages: Sequence[StageAddress], *, step_timeout_s: float, silence_s: float = SILENCE_S
    ) -> "StageLink":
        """Connect to every stage in order; raises StageLostError naming the one that is not there.

        ``step_timeout_s`` is the longest a step may take; less is allowed once steps of its size are known.
        """
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
        return cls(channels, step_timeout_s, silence_s)

    @property
    def num_stages(self) -> int:
        """Length of the pipeline."""
        return len(self._channels)

    def set_step_timeout(self, step_timeout_s: float) -> None:
        """From now on, the longest a step may take; also of steps in flight."""
        self._deadline.ceiling_s = step_timeout_s

    async def send(self, step: StepInput | EmbedInput) -> None:
        """Hand a step to every stage; raises StageLostError."""
        message = self._compactor.compact(step, follows=bool(self._awaited)) if isinstance(step, StepInput) else step
        frame = encode(message)
        self._awaited.append((_num_tokens(step), self._loop.time()))
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
        result = await self._results.get()
        if isinstance(result, StageLostError):
            return self._find_cause(result)
        return result

    def _find_cause(self, loss: StageLostError) -> tuple[StageFailed, list[bytes]]:
        """A failure that was reported just as connections broke; raises ``loss`` if there is none.

        A stage that fails says so and leaves, and its neighbours leave with it: their ends may be seen first.
        """
        while not self._results.empty():
            other = self._results.get_nowait()
            if not isinstance(other, StageLostError) and isinstance(other[0], StageFailed):
                return other[0], []
        raise loss

    async def _read(self, index: int, channel: Channel) -> None:
        while True:
            try:
                message, buffers = await channel.receive()
            except ChannelError as error:
                if isinstance(error, ChannelCorrupt):
                    self.suspects.add(index)
                self._lose(StageLostError(index, str(error)))
                return
            self._heard_s[index] = self._loop.time()
            if isinstance(message, Alive):
                continue
            if not isinstance(message, StageResult):
                self.suspects.add(index)
                self._lose(StageLostError(index, f"it sent a {type(message).__name__}"))
                return
            if isinstance(message, StageFailed) and message.misheard:
                self.suspects.add((index - 1) % self.num_stages)
            self._note_result()
            self._results.put_nowait((message, buffers))

    def _note_result(self) -> None:
        now_s = self._loop.time()
        if self._awaited:
            num_tokens, sent_s = self._awaited.popleft()
            self._deadline.observe(num_tokens, now_s - max(sent_s, self._answered_s))
        self._answered_s = now_s

    async def _watch(self) -> None:
        """Look after silent stages and overdue steps until one is found."""
        while not self._lost.done():
            begin_s = self._loop.time()
            watch_s = min(_WATCH_S, self._silence_s / 4, self._deadline.ceiling_s / 4)
            await asyncio.sleep(watch_s)
            now_s = self._loop.time()
            # What this process was too busy to read says nothing about the stages.
            held_up_s = now_s - begin_s - watch_s
            self._heard_s = [heard_s + held_up_s for heard_s in self._heard_s]
            self._answered_s += held_up_s
            self._find_silent(now_s)
            self._find_overdue(now_s)

    def _find_silent(self, now_s: float) -> None:
        for index, heard_s in enumerate(self._heard_s):
            if now_s - heard_s > self._silence_s:
                self.suspects.add(index)
                self._lose(StageLostError(index, f"it gave no sign of life for {self._silence_s:g} s"))

    def _find_overdue(self, now_s: float) -> None:
        if not self._awaited:
            return
        num_tokens, sent_s = self._awaited[0]
        limit_s = self._deadline.limit_s(num_tokens)
        if now_s - max(sent_s, self._answered_s) > limit_s:
            self._lose(
                StageLostError(None, f"no stage answered a step of {num_tokens} tokens within {limit_s:.3g} s")
            )

    def _lose(self, loss: StageLostError) -> None:
        self._results.put_nowait(loss)
        if not self._lost.done():
            self._lost.set_result(loss)

    async def wait_lost(self) -> StageLostError:
        """Return, as soon as a stage is lost, which and why; also while no step is under way."""
        return await asyncio.shield(self._lost)

    def quiet_s(self, stage: int | None) -> float | None:
        """How long ago ``stage`` was heard last: it died no earlier. None when the stage is not known."""
        return None if stage is None else self._loop.time() - self._heard_s[stage]

    async def close(self) -> None:
        """Close every connection; the stages stop serving."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            channel.close()


def _num_tokens(step: StepInput | EmbedInput) -> int:
    if isinstance(step, EmbedInput):
        return sum(len(token_ids) for token_ids in step.inputs)
    return sum(max(1, len(part.token_ids)) for part in step.sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What a repair came to: the link to stages that all live, which of them are new, and where the time went."""

    link: StageLink
    replaced: tuple[int, ...]
    spawn_s: float
    """Until the slowest new process ran and had imported what it needs; 0 without a new one."""
    load_s: float
    """How long the slowest of them took to load its weights."""
    connect_s: float
    """From the last stage's address to the whole pipeline."""
