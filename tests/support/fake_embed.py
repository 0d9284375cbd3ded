"""An embedding pipeline without a model: a vector is a pure function of its input's tokens."""

import asyncio
from collections import deque

import numpy as np

from deployments.messages import EmbedInput, EmbedOutput, StageFailed
from deployments.stage.link import StageLostError


def vector_of(token_ids: tuple[int, ...]) -> np.ndarray:
    """Three numbers that tell inputs apart."""
    weighted = sum((position + 1) * token_id for position, token_id in enumerate(token_ids))
    return np.array([len(token_ids), sum(token_ids), weighted], dtype=np.float32)


class FakeEmbedLink:
    """``close_gate`` holds answers back; ``fail_at_step`` answers StageFailed; ``die_at_step`` raises on send."""

    def __init__(
        self, *, num_stages: int = 1, fail_at_step: int | None = None, die_at_step: int | None = None
    ) -> None:
        self.num_stages = num_stages
        self.sent: list[EmbedInput] = []
        self._fail_at_step = fail_at_step
        self._die_at_step = die_at_step
        self._unanswered: deque[EmbedInput] = deque()
        self._news = asyncio.Event()
        self._gate = asyncio.Event()
        self._gate.set()

    def close_gate(self) -> None:
        self._gate.clear()

    def open_gate(self) -> None:
        self._gate.set()

    async def send(self, step: EmbedInput) -> None:
        assert len(self._unanswered) < self.num_stages, "one batch too many in flight"
        if step.step == self._die_at_step:
            raise StageLostError(0, "it was killed by the test")
        self.sent.append(step)
        self._unanswered.append(step)
        self._news.set()

    async def receive_vectors(self) -> tuple[EmbedOutput | StageFailed, list[bytes]]:
        while not self._unanswered:
            self._news.clear()
            await self._news.wait()
        await self._gate.wait()
        step = self._unanswered.popleft()
        if step.step == self._fail_at_step:
            return StageFailed(step=step.step, message="the test asked for it"), []
        vectors = np.stack([vector_of(token_ids) for token_ids in step.inputs])
        output = EmbedOutput(step=step.step, num_vectors=len(step.inputs), dimensions=3)
        return output, [vectors.tobytes()]
