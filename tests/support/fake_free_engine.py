"""An engine that schedules by itself, behind the engine's StageLink, as vLLM does: no blocks, no plan.

Each step it advances some of its sequences, drawn from ``seed``: none, some, or all. A token is the same function of
history, seed, choice and position as in :mod:`tests.support.fake_stage`. It ends sequences by itself at an end token,
a stop token or their limit, and goes on where the replica has to find the end (stop strings).
"""

import asyncio
import random
from collections import deque

from deployments.messages import Sample, SequenceStart, StageFailed, StageTiming, StepInput, StepOutput
from deployments.stage.link import StageLostError
from tests.support.fake_stage import next_token


class FreeEngineLink:
    """The replica's end. ``die_at_step``: sending or receiving raises once that step was sent."""

    num_stages = 1

    def __init__(self, vocab_size: int, *, seed: int = 0, die_at_step: int | None = None) -> None:
        self.sent: list[StepInput] = []
        self.most_running = 0
        self.running: dict[int, list[int]] = {}
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._die_at_step = die_at_step
        self._starts: dict[int, SequenceStart] = {}
        self._done: set[int] = set()
        self._steps: deque[StepInput] = deque()
        self._news = asyncio.Event()

    async def send(self, step: StepInput) -> None:
        assert len(self._steps) < 2, "two steps in flight are enough"
        assert not step.sequences, "such an engine plans by itself"
        self.sent.append(step)
        self._steps.append(step)
        self._news.set()
        self._die_if_due()

    def _die_if_due(self) -> None:
        if self._die_at_step is not None and any(step.step >= self._die_at_step for step in self.sent):
            raise StageLostError(0, "it was killed by the test")

    async def receive(self) -> StepOutput | StageFailed:
        while not self._steps:
            self._news.clear()
            await self._news.wait()
        await asyncio.sleep(0)
        self._die_if_due()
        step = self._steps.popleft()
        for sequence_id in step.ended:
            del self.running[sequence_id], self._starts[sequence_id]
            self._done.discard(sequence_id)
        for start in step.started:
            assert start.sequence_id not in self.running, "it is running already"
            self._starts[start.sequence_id] = start
            self.running[start.sequence_id] = list(start.token_ids)
        self.most_running = max(self.most_running, len(self.running))
        open_ids = [each for each in self.running if each not in self._done]
        chosen = self._random.sample(open_ids, self._random.randint(0, len(open_ids)))
        samples = tuple(self._advance(sequence_id) for sequence_id in chosen)
        return StepOutput(step=step.step, samples=samples, timing=StageTiming(0, 0.0, 0.0, 0.0, 0.0))

    def _advance(self, sequence_id: int) -> Sample:
        start, history = self._starts[sequence_id], self.running[sequence_id]
        token_id, logprob = next_token(history, start, self._vocab_size)
        history.append(token_id)
        num_emitted = len(history) - start.num_prompt_tokens
        assert num_emitted <= start.sampling.max_tokens
        ends = {*start.eos_token_ids, *start.sampling.stop_token_ids}
        if num_emitted == start.sampling.max_tokens or (num_emitted > start.sampling.min_tokens and token_id in ends):
            self._done.add(sequence_id)
        return Sample(sequence_id, token_id, logprob)
