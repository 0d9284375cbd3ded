"""A pipeline without a model, behind the engine's StageLink: it fails loudly when block accounting is wrong.

Every stage has a paged store of its own, keyed by block id and offset, that starts out empty. A step writes the
position and identity of each computed token where the block table says, and reads the whole history back through
the table. The next token is a pure function of what was read, the seed, the choice and the position. So a wrong
block, a stale one, one reused too early, or a wrong position either changes the tokens or raises.

Within a step all histories are read before anything is written, as the most adverse order a real stage may have.
Stages advance independently, in an order drawn from ``schedule_seed``, each strictly in the order steps were sent.
"""

import asyncio
import hashlib
import random
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from deployments.messages import (
    Sample,
    SamplingParams,
    SequenceStart,
    SequenceStep,
    StageFailed,
    StageTiming,
    StepInput,
    StepOutput,
)
from deployments.stage.link import StageLostError

EOS_PER_MILLE = 60


SPELL_TOKENS = 12


def next_token(history: Sequence[int], start: SequenceStart, vocab_size: int) -> tuple[int, float]:
    """The token after ``history`` and its log-probability; greedy sequences ignore seed and choice.

    One with a bias repeats itself for a spell, then another way: the bias says after how many tokens.
    """
    sampling = start.sampling
    randomness = () if sampling.temperature == 0.0 else (start.seed, start.choice)
    read = tuple(history)
    for period in map(int, sampling.logit_bias.values()):
        position = len(history)
        read = (position // SPELL_TOKENS, position % period)
    digest = hashlib.blake2b(repr((read, randomness)).encode(), digest_size=16).digest()
    number = int.from_bytes(digest, "little")
    logprob = -float(1 + number % 7)
    banned = set()
    if len(history) - start.num_prompt_tokens < sampling.min_tokens:
        banned = {*start.eos_token_ids, *sampling.stop_token_ids}
    if start.eos_token_ids and number % 1000 < EOS_PER_MILLE and not banned:
        return start.eos_token_ids[0], logprob
    token_id = (number >> 32) % vocab_size
    while token_id in banned:
        token_id = (token_id + 1) % vocab_size
    return token_id, logprob


def reference_tokens(
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    seed: int,
    choice: int,
    eos_token_ids: tuple[int, ...],
    vocab_size: int,
) -> list[int]:
    """What the fake pipeline generates for one choice, undisturbed, up to an end token or ``max_tokens``."""
    eos = () if sampling.ignore_eos else eos_token_ids
    start = SequenceStart(0, tuple(prompt), len(prompt), sampling, seed, choice, eos)
    history = list(prompt)
    while len(history) - len(prompt) < sampling.max_tokens:
        token_id, _ = next_token(history, start, vocab_size)
        history.append(token_id)
        num_emitted = len(history) - len(prompt)
        if num_emitted > sampling.min_tokens and token_id in {*eos, *sampling.stop_token_ids}:
            break
    return history[len(prompt) :]


class BlockMisuse(AssertionError):
    """A step read or wrote the cache where it must not."""


class PagedStore:
    """One stage's cache: what was written at (block, offset)."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self._num_blocks = num_blocks
        self._block_tokens = block_tokens
        self._slots: dict[tuple[int, int], tuple[int, int]] = {}

    def read(self, step: SequenceStep, stop: int) -> list[int]:
        """Tokens at positions 0 .. stop, each of which must have been written as that position."""
        return [self._read_one(step, position) for position in range(stop)]

    def _read_one(self, step: SequenceStep, position: int) -> int:
        slot = self._slot(step, position)
        written = self._slots.get(slot)
        if written is None or written[0] != position:
            raise BlockMisuse(f"sequence {step.sequence_id} reads position {position} at {slot}, which has {written}")
        return written[1]

    def write(self, step: SequenceStep) -> None:
        """Store the step's tokens at their positions."""
        assert step.chosen_in is None, "a step is resolved before it is computed"
        for position, token_id in enumerate(step.token_ids, start=step.position):
            self._slots[self._slot(step, position)] = (position, token_id)

    def _slot(self, step: SequenceStep, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self._block_tokens)
        if index >= len(step.block_ids):
            raise BlockMisuse(f"sequence {step.sequence_id} has no block for position {position}: {step.block_ids}")
        block = step.block_ids[index]
        if not 0 <= block < self._num_blocks:
            raise BlockMisuse(f"block {block} is not one of {self._num_blocks}")
        return block, offset


class FakeStageLink:
    """The engine's end of a fake pipeline.

    ``fail_at_step``: that step is answered by StageFailed. ``die_at_step``: sending or receiving raises once that
    step was sent. ``hang_at_step``: sending it never returns, as to a peer that reads no more. ``on_send`` is called
    before each step.
    """

    def __init__(
        self,
        *,
        num_stages: int,
        num_blocks: int,
        block_tokens: int,
        vocab_size: int,
        schedule_seed: int = 0,
        max_step_tokens: int | None = None,
        fail_at_step: int | None = None,
        die_at_step: int | None = None,
        hang_at_step: int | None = None,
        on_send: Callable[[], None] | None = None,
    ) -> None:
        self.num_stages = num_stages
        self.sent: list[StepInput] = []
        self.num_answered = 0
        self.num_ahead = 0
        """Positions asked for before their token was known."""
        self.num_drafts = 0
        self.num_right = 0
        self._vocab_size = vocab_size
        self._max_step_tokens = max_step_tokens
        self._fail_at_step = fail_at_step
        self._die_at_step = die_at_step
        self._hang_at_step = hang_at_step
        self._on_send = on_send
        self._random = random.Random(schedule_seed)
        self._stores = [PagedStore(num_blocks, block_tokens) for _ in range(num_stages)]
        self._queues: list[deque[StepInput]] = [deque() for _ in range(num_stages)]
        self._hidden: list[deque[list[list[int]]]] = [deque() for _ in range(num_stages)]
        self._starts: dict[int, SequenceStart] = {}
        self._sampled: dict[int, list[int]] = {}
        self._chosen: dict[int, dict[int, int]] = {}
        self._answers: deque[StepOutput | StageFailed] = deque()
        self._gate = asyncio.Event()
        self._gate.set()
        self._news = asyncio.Event()

    def close_gate(self) -> None:
        """Hold every answer back, as a pipeline that computes for a long time."""
        self._gate.clear()

    def open_gate(self) -> None:
        """Let answers out again."""
        self._gate.set()

    @property
    def num_outstanding(self) -> int:
        """Steps sent and not answered."""
        return len(self.sent) - self.num_answered

    async def send(self, step: StepInput) -> None:
        """Queue a step at every stage."""
        self._check(step)
        if self._on_send is not None:
            self._on_send()
        self.sent.append(step)
        for queue in self._queues:
            queue.append(step)
        self._news.set()
        if step.step == self._hang_at_step:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        self._die_if_due()

    def _check(self, step: StepInput) -> None:
        if self.num_outstanding > self.num_stages:
            raise BlockMisuse(f"step {step.step} is one more than {self.num_stages + 1} in flight")
        num_tokens = sum(part.num_tokens for part in step.sequences)
        if self._max_step_tokens is not None and num_tokens > self._max_step_tokens:
            raise BlockMisuse(f"step {step.step} has {num_tokens} tokens, above {self._max_step_tokens}")
        sequence_ids = [part.sequence_id for part in step.sequences]
        if not sequence_ids or len(set(sequence_ids)) != len(sequence_ids):
            raise BlockMisuse(f"step {step.step} names sequences {sequence_ids}")

    def _die_if_due(self) -> None:
        if self._die_at_step is not None and any(step.step >= self._die_at_step for step in self.sent):
            raise StageLostError(0, "it was killed by the test")

    async def receive(self) -> StepOutput | StageFailed:
        """The oldest answer; runs stages in a random order until there is one."""
        while True:
            await self._gate.wait()
            self._die_if_due()
            if self._answers:
                self.num_answered += 1
                return self._answers.popleft()
            runnable = [stage for stage in range(self.num_stages) if self._can_run(stage)]
            if runnable:
                self._run(self._random.choice(runnable))
                await asyncio.sleep(0)
            else:
                self._news.clear()
                await self._news.wait()

    def _can_run(self, stage: int) -> bool:
        if not self._queues[stage]:
            return False
        if stage > 0:
            return bool(self._hidden[stage])
        return all(part.chosen_in is None or part.chosen_in in self._chosen for part in self._queues[0][0].sequences)

    def _resolve(self, step: StepInput) -> StepInput:
        """Put what earlier steps chose in its place."""
        parts = []
        for part in step.sequences:
            if part.chosen_in is not None:
                assert not part.token_ids
                self.num_ahead += 1
                token_ids = (self._chosen[part.chosen_in][part.sequence_id],)
                part = msgspec.structs.replace(part, token_ids=token_ids, chosen_in=None)
            parts.append(part)
        return msgspec.structs.replace(step, sequences=tuple(parts))

    def _run(self, stage: int) -> None:
        step = self._resolve(self._queues[stage].popleft())
        store = self._stores[stage]
        earlier = [store.read(part, part.position) for part in step.sequences]
        for part in step.sequences:
            store.write(part)
        histories = [[*old, *part.token_ids] for old, part in zip(earlier, step.sequences, strict=True)]
        for history, part in zip(histories, step.sequences, strict=True):
            if store.read(part, len(history)) != history:
                raise BlockMisuse(f"step {step.step}: another sequence wrote over the blocks of {part.sequence_id}")
        if stage > 0 and self._hidden[stage].popleft() != histories:
            raise BlockMisuse(f"step {step.step}: stages {stage - 1} and {stage} saw different histories")
        if stage + 1 < self.num_stages:
            self._hidden[stage + 1].append(histories)
        else:
            self._answers.append(self._sample(step, histories))

    def _sample(self, step: StepInput, histories: list[list[int]]) -> StepOutput | StageFailed:
        for sequence_id in step.ended:
            del self._starts[sequence_id], self._sampled[sequence_id]
        for start in step.started:
            if start.sequence_id in self._starts:
                raise BlockMisuse(f"sequence {start.sequence_id} was started twice")
            self._starts[start.sequence_id] = start
            self._sampled[start.sequence_id] = list(start.token_ids)
        if step.step == self._fail_at_step:
            return StageFailed(step=step.step, message="the test asked for it")
        samples = [
            sample
            for part, history in zip(step.sequences, histories, strict=True)
            if part.sample
            for sample in self._sample_run(part, history)
        ]
        self._chosen[step.step] = {sample.sequence_id: sample.token_id for sample in samples}
        timing = StageTiming(self.num_stages - 1, 0.0, 0.0, 0.0)
        return StepOutput(step=step.step, samples=tuple(samples), timing=timing)

    def _sample_run(self, part: SequenceStep, history: list[int]) -> list[Sample]:
        samples = []
        num_known = len(history) - part.num_drafts
        for num_read, draft in enumerate((*part.drafts, None), start=num_known):
            samples.append(self._sample_one(part, history[:num_read]))
            if samples[-1].token_id != draft:
                break
        self.num_drafts += part.num_drafts
        self.num_right += len(samples) - 1
        return samples

    def _sample_one(self, part: SequenceStep, history: list[int]) -> Sample:
        known = self._sampled[part.sequence_id]
        if known != history:
            raise BlockMisuse(f"sequence {part.sequence_id} has {known}, but its cache holds {history}")
        start = self._starts[part.sequence_id]
        token_id, logprob = next_token(history, start, self._vocab_size)
        known.append(token_id)
        if start.sampling.logprobs is None:
            return Sample(part.sequence_id, token_id)
        top = tuple((rank, logprob - rank) for rank in range(start.sampling.logprobs))
        return Sample(part.sequence_id, token_id, logprob, top)
