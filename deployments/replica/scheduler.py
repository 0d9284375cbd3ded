"""Sequences and free blocks enter, the next micro-batch leaves: continuous batching, decided without any I/O.

One call of :meth:`Scheduler.plan` composes one step under a token budget: first one token for each decoding
sequence of this micro-batch's share, then chunks of prompts, oldest first. Up to ``num_stages`` steps are in flight,
so that every stage has one to work on, and ``steps_ahead`` more.

Running ahead, where ``steps_ahead`` is 1: so that the first stage has its next step at hand, that one may ask for the
position after a token that is still being chosen, which the stages put in themselves. A sequence that turns out to
have ended with that token has one such position computed for nothing, and its sample is dropped. A sequence is thus
in at most two sampling steps at a time; one that is known to end with the token being chosen (``max_tokens``) does
not run ahead. What is chosen is the same either way: a token depends on the tokens before it, the seed, the choice
and the position alone.

Drafting: a sequence that repeats itself does not run ahead either. In a step without prompts it takes guesses at its
next tokens along, as many as there is room for, and those that are right are tokens for less than a step each.

Why nobody starves: decoding goes first but always leaves a part of the budget to prompts (``decode_share``);
sequences are admitted in order of arrival and one that does not fit blocks those behind it; when blocks run out the
youngest sequence gives up its own, so the oldest always advances.
"""

from bisect import insort
from collections import deque
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from cluster.plan.memory import max_step_drafts
from cluster.plan.types import StepsAhead
from deployments.messages import Sample, StepInput, StepOutput
from deployments.replica.blocks import BlockPool
from deployments.replica.sequence import Sequence, SequenceState

_PREFILL_RESERVE = 8  # decoding leaves at least an eighth of the budget to waiting prompts
_PREFILL_PARTS_PER_STAGE = 4


class StepMismatch(Exception):
    """The stages answered something that was not asked: the replica and its stages have lost each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one micro-batch and of all of them together.

    ``min_decode_split``: decoding sequences are not spread so thin that a micro-batch has fewer than this, because
    a step over one costs about as much as a step over two. ``min_prefill_chunk``: likewise for prompt tokens.
    ``speculative_tokens``: drafts that a sequence may take along in one step; 0 for none. The plan's memory bounds
    those of all sequences together.
    ``steps_ahead``: steps in flight beyond one per stage; with 0, a token is always known before its step is planned.
    """

    num_stages: int
    max_running: int
    max_step_tokens: int
    min_decode_split: int = 2
    min_prefill_chunk: int = 64
    speculative_tokens: int = 0
    steps_ahead: StepsAhead = 0

    def __post_init__(self) -> None:
        """Raise ValueError for limits under which nothing could run."""
        for name in ("num_stages", "max_running", "max_step_tokens", "min_decode_split", "min_prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_step_tokens < 2:
            raise ValueError("max_step_tokens is 1; it must be at least 2: one to decode and one of a prompt")

    @property
    def max_in_flight(self) -> int:
        """Steps that may be sent and not answered."""
        return self.num_stages + self.steps_ahead

    @property
    def num_prefill_parts(self) -> int:
        """Micro-batches over which prompts are spread, where they are long enough."""
        return 1 if self.num_stages == 1 else _PREFILL_PARTS_PER_STAGE * self.num_stages


def decode_share(config: SchedulerConfig, num_decoding: int, *, prompts_wait: bool) -> int:
    """How many decoding sequences the next micro-batch may take, of ``num_decoding`` in flight or ready.

    An equal part per stage, so that with 2 stages and 8 sequences two micro-batches of 4 alternate. Prompts that
    wait keep a part of the token budget.
    """
    reserve = max(1, config.max_step_tokens // _PREFILL_RESERVE) if prompts_wait else 0
    share = _even_part(num_decoding, config.num_stages, config.min_decode_split)
    return min(share, config.max_step_tokens - reserve)


def prefill_share(config: SchedulerConfig, num_prompt_tokens: int) -> int:
    """How many prompt tokens the next micro-batch may take, of unfinished prompts of ``num_prompt_tokens`` in all.

    With several stages only a part: while one computes a long chunk, the others wait, and micro-batches of about one
    size keep all of them busy (Sarathi-Serve, arXiv:2403.02310).
    """
    return _even_part(num_prompt_tokens, config.num_prefill_parts, config.min_prefill_chunk)


def _even_part(amount: int, max_parts: int, min_part: int) -> int:
    """Size of one part when ``amount`` is cut evenly into at most ``max_parts``, none smaller than ``min_part``."""
    num_parts = min(max_parts, max(1, amount // min_part))
    return -(-amount // num_parts)


class _Part(NamedTuple):
    """A sequence in a micro-batch: known tokens (or the one being chosen), and guesses behind them."""

    sequence: Sequence
    num_tokens: int
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFlight:
    step: int
    sampled: tuple[_Part, ...]


class Scheduler:
    """All sequences of one replica: who waits, who runs, and what the stages are asked next."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self.num_steps = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._pool = pool
        self._waiting: list[Sequence] = []
        self._running: dict[int, Sequence] = {}
        self._prefilling: dict[int, Sequence] = {}
        self._ready: dict[int, Sequence] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._ended: list[int] = []

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_blocks_used(self) -> int:
        """Blocks that sequences hold."""
        return self._pool.num_used

    @property
    def kv_used_fraction(self) -> float:
        """Blocks held, of all there are."""
        return self._pool.num_used / self._pool.num_blocks

    @property
    def num_in_flight(self) -> int:
        """Steps sent and not answered."""
        return len(self._in_flight)

    @property
    def waiting(self) -> AnySequence[Sequence]:
        """Sequences without blocks, oldest first."""
        return self._waiting

    @property
    def running(self) -> AnySequence[Sequence]:
        """Sequences with blocks."""
        return tuple(self._running.values())

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by its age."""
        insort(self._waiting, sequence, key=_age)

    def end(self, sequence: Sequence) -> None:
        """Finished or cancelled: free its blocks now, even while steps with it are in flight.

        Such a step may yet write to the freed blocks, also one that runs ahead of the token the sequence ended with.
        That is safe: whoever gets the blocks next is in a later step, every stage runs steps in the order sent, and
        no sequence reads a position before a step of its own, or of the one that registered the block, wrote it.
        Blocks in the prefix cache are full of known tokens, so what runs ahead writes to none of them.
        """
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            self._leave(sequence)
        sequence.blocks = ()
        sequence.state = SequenceState.FINISHED

    def _leave(self, sequence: Sequence) -> None:
        del self._running[sequence.sequence_id]
        self._prefilling.pop(sequence.sequence_id, None)
        self._ready.pop(sequence.sequence_id, None)
        self._pool.free(sequence.blocks)
        if sequence.announced:
            self._ended.append(sequence.sequence_id)

    def plan(self) -> StepInput | None:
        """The next micro-batch, to be sent to every stage now; None when the pipeline is full or nothing can run."""
        if len(self._in_flight) >= self.config.max_in_flight:
            return None
        num_preemptions = self.num_preemptions
        decodes = self._choose_decodes()
        prefills = self._choose_prefills(self.config.max_step_tokens - len(decodes))
        # With a prompt in the step nobody drafts: the newcomer's first token would wait for it.
        parts = [*decodes, *prefills] if prefills else self._with_drafts(decodes)
        if not parts and self.num_preemptions > num_preemptions:
            return self.plan()  # all that was chosen gave up its own blocks; others are ready, and have room now
        return self._dispatch(parts) if parts else None

    def _choose_decodes(self) -> list[_Part]:
        num_decoding = len(self._running) - len(self._prefilling)
        prompts_wait = bool(self._prefilling or self._waiting)
        share = decode_share(self.config, num_decoding, prompts_wait=prompts_wait)
        candidates = self._decodable()[:share]
        # Oldest first, so that a preemption never hits a sequence already extended here.
        extended = {sequence.sequence_id for sequence in sorted(candidates, key=_age) if self._extend(sequence)}
        # In the order they became ready, which is also how they will queue again: everybody gets the same share.
        return [_Part(sequence, 1) for sequence in candidates if sequence.sequence_id in extended]

    def _with_drafts(self, decodes: list[_Part]) -> list[_Part]:
        """The same, each with its guesses; those who were chosen first take first."""
        num_spare = min(
            self.config.max_step_tokens - len(decodes),
            max_step_drafts(self.config.max_running, self.config.speculative_tokens),
        )
        parts = []
        for part in decodes:
            parts.append(part._replace(drafts=self._draft(part.sequence, num_spare)))
            num_spare -= len(parts[-1].drafts)
        return parts

    def _draft(self, sequence: Sequence, num_spare: int) -> tuple[int, ...]:
        """What ``sequence`` takes along beyond its next position; nobody is preempted for it."""
        num_left = sequence.sampling.max_tokens - sequence.num_emitted - 1
        num_wanted = min(self.config.speculative_tokens, num_spare, num_left)
        if num_wanted <= 0 or sequence.sample_steps or not sequence.drafter.is_confident:
            return ()
        drafts = sequence.drafter.draft(sequence.tokens, num_wanted)
        num_missing = self._pool.num_needed(len(sequence.tokens) + len(drafts)) - len(sequence.blocks)
        if num_missing > 0:
            sequence.blocks += self._pool.allocate(num_missing) or ()
        return drafts[: len(sequence.blocks) * self._pool.block_tokens - len(sequence.tokens)]

    def _decodable(self) -> list[Sequence]:
        """Sequences that this step may take one position further, those first that have waited longest.

        One whose token is still being chosen comes in only when as many steps lie between as there are other stages:
        else the first stage would wait for the last. When nothing else is left to do it comes in all the same, and
        the token goes straight from the last stage to the first.
        """
        in_flight, num_between = self._in_flight, self.config.num_stages - 1
        newest_step = in_flight[-1 - num_between].step if len(in_flight) > num_between else 0
        ready = [s for s in self._ready.values() if not s.sample_steps or s.sample_steps[0] <= newest_step]
        if not ready and not self._prefilling and not self._waiting and in_flight:
            ready = [s for s in self._ready.values() if s.sample_steps[0] == in_flight[0].step]
        return ready

    def _extend(self, sequence: Sequence) -> bool:
        """Make room for one more position, taking blocks from the youngest if need be; False if it lost its own."""
        if sequence.state is not SequenceState.RUNNING:
            return False
        if sequence.num_computed < len(sequence.blocks) * self._pool.block_tokens:
            return True
        while (block := self._pool.allocate(1)) is None:
            youngest = max(self._running.values(), key=_age)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.blocks += block
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take all blocks; samples in flight are still taken in :meth:`complete`, being valid tokens."""
        self._leave(sequence)
        sequence.reset_for_recompute()
        self.add(sequence)
        self.num_preemptions += 1

    def _choose_prefills(self, budget: int) -> list[_Part]:
        num_unfinished = self._count_unfinished(budget * self.config.num_prefill_parts)
        left = min(budget, prefill_share(self.config, num_unfinished))
        parts = []
        for sequence in sorted(self._prefilling.values(), key=_age):
            if left == 0:
                break
            parts.append(_Part(sequence, min(left, sequence.num_uncomputed)))
            left -= parts[-1].num_tokens
        index = 0
        while left > 0 and index < len(self._waiting) and len(self._running) < self.config.max_running:
            sequence = self._waiting[index]
            if sequence.waits_for_leader:
                index += 1  # its turn comes with the step after its leader's prompt
                continue
            if sequence.sample_steps or not self._admit(sequence):
                break
            del self._waiting[index]
            parts.append(_Part(sequence, min(left, sequence.num_uncomputed)))
            left -= parts[-1].num_tokens
        return parts

    def _count_unfinished(self, enough: int) -> int:
        """Tokens of the prompts that are being computed or could be, whole ones, counted up to ``enough``."""
        num_tokens = sum(len(sequence.tokens) for sequence in self._prefilling.values())
        for sequence in self._waiting:
            if num_tokens >= enough:
                break
            if not sequence.waits_for_leader:
                num_tokens += len(sequence.tokens)
        return num_tokens

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence blocks for all its tokens, cached ones first; False (no change) if they are short.

        Leaves one block for each running sequence to grow into, so that a newcomer is not preempted at once.
        """
        pool = self._pool
        matched: tuple[int, ...] = ()
        if pool.prefix_caching:
            # At least the last token is computed even when all of them are cached: somebody must ask for the sample.
            num_cacheable = (len(sequence.tokens) - 1) // pool.block_tokens
            pool.extend_digests(sequence.digests, sequence.tokens, num_cacheable, sequence.adapter)
            matched = pool.match_prefix(sequence.digests[:num_cacheable])
        num_new = pool.num_needed(len(sequence.tokens)) - len(matched)
        if not pool.can_take(matched, num_new + len(self._running)):
            return False
        pool.acquire(matched)
        allocated = pool.allocate(num_new)
        assert allocated is not None, "can_take promised these blocks; this is a bug"
        self._enter(sequence, matched, allocated)
        return True

    def _enter(self, sequence: Sequence, matched: tuple[int, ...], allocated: tuple[int, ...]) -> None:
        sequence.state = SequenceState.RUNNING
        sequence.blocks = matched + allocated
        sequence.num_computed = len(matched) * self._pool.block_tokens
        sequence.num_registered = len(matched)
        self._running[sequence.sequence_id] = sequence
        self._prefilling[sequence.sequence_id] = sequence
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.num_prefix_queries += len(sequence.tokens)
            self.num_prefix_hits += sequence.num_computed

    def _dispatch(self, parts: list[_Part]) -> StepInput:
        self.num_steps += 1
        started = []
        steps = []
        for sequence, num_tokens, drafts in parts:
            if not sequence.announced:
                started.append(sequence.start())
                sequence.announced = True
            steps.append(sequence.advance(num_tokens, self.num_steps, drafts))
            self._ready.pop(sequence.sequence_id, None)
            if steps[-1].sample:
                self._prefilling.pop(sequence.sequence_id, None)
                self._make_ready(sequence)
        for part in parts:
            self._register(part.sequence)
        self._in_flight.append(
            _InFlight(
                step=self.num_steps,
                sampled=tuple(part for part, step in zip(parts, steps, strict=True) if step.sample),
            )
        )
        ended, self._ended = tuple(self._ended), []
        return StepInput(step=self.num_steps, sequences=tuple(steps), started=tuple(started), ended=ended)

    def _make_ready(self, sequence: Sequence) -> None:
        """Let it queue for its next position, behind those that queue already."""
        if sequence.sample_steps and (sequence.drafter.is_confident or not self.config.steps_ahead):
            return
        if sequence.may_decode:
            self._ready.setdefault(sequence.sequence_id, sequence)

    def _register(self, sequence: Sequence) -> None:
        """Offer the blocks that steps so far fill with known tokens to the prefix cache, for the steps after them."""
        num_known = min(sequence.num_computed, len(sequence.tokens))
        num_full = num_known // self._pool.block_tokens
        if num_full <= sequence.num_registered or not self._pool.prefix_caching:
            return
        self._pool.extend_digests(sequence.digests, sequence.tokens, num_full, sequence.adapter)
        for index in range(sequence.num_registered, num_full):
            self._pool.register(sequence.blocks[index], sequence.digests[index])
        sequence.num_registered = num_full

    def complete(self, output: StepOutput) -> list[tuple[Sequence, AnySequence[Sample]]]:
        """Take the oldest step's samples; returns those of live sequences, appended to them and ready to go on.

        Raises StepMismatch when the output is not the answer to the oldest step in flight.
        """
        if not self._in_flight or self._in_flight[0].step != output.step:
            expected = self._in_flight[0].step if self._in_flight else "none"
            raise StepMismatch(f"the last stage answered step {output.step}; expected {expected}")
        done = self._in_flight.popleft()
        taken = []
        for (sequence, _, drafts), samples in _match(done, output):
            if sequence.state is SequenceState.FINISHED:
                continue
            sequence.take(sample.token_id for sample in samples)
            self.num_draft_tokens += len(drafts)
            self.num_accepted_tokens += len(samples) - 1
            if self.config.speculative_tokens:
                sequence.drafter.read(sequence.tokens)
            if sequence.state is SequenceState.RUNNING:
                self._register(sequence)
                self._make_ready(sequence)
            taken.append((sequence, samples))
        return taken

    def reset(self, num_stages: int | None = None) -> None:
        """The stages are new and know nothing: every running sequence waits again, steps in flight never happened."""
        for sequence in self._running.values():
            sequence.reset_for_recompute()
            self.add(sequence)
        for sequence in self._waiting:
            sequence.sample_steps.clear()
            sequence.announced = False
        self._running.clear()
        self._prefilling.clear()
        self._ready.clear()
        self._in_flight.clear()
        self._ended.clear()
        self._pool.reset()
        if num_stages is not None:
            self.config = replace(self.config, num_stages=num_stages)


def _match(done: _InFlight, output: StepOutput) -> list[tuple[_Part, AnySequence[Sample]]]:
    """Each part that was to be sampled with its samples; raises StepMismatch for others, or too many of them."""
    by_sequence = [(key, list(samples)) for key, samples in groupby(output.samples, key=lambda s: s.sequence_id)]
    got = [(sequence_id, len(samples)) for sequence_id, samples in by_sequence]
    most = [(part.sequence.sequence_id, 1 + len(part.drafts)) for part in done.sampled]
    if len(got) != len(most) or any(
        one[0] != other[0] or one[1] > other[1] for one, other in zip(got, most, strict=True)
    ):
        raise StepMismatch(f"step {output.step} sampled (sequence, tokens) {got}; expected {most} at most")
    return [(part, samples) for part, (_, samples) in zip(done.sampled, by_sequence, strict=True)]


def _age(sequence: Sequence) -> int:
    return sequence.sequence_id
