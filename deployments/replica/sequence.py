"""One sequence: enters as prompt and parameters, leaves as emitted tokens; all else it holds can be recomputed.

    WAITING -> RUNNING -> FINISHED
       ^          |
       +----------+  preempted (blocks taken away) or stages lost: ``reset_for_recompute``

The unit of recovery is (prompt, parameters, seed, choice, emitted tokens). Block table, position and digests are
derived: after a reset the same tokens follow, because a token is a function of the tokens before it, the seed, the
choice and the position alone.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from deployments.messages import SamplingParams, SequenceStart, SequenceStep
from deployments.replica.speculation import NgramDrafter


class SequenceState(enum.Enum):
    """Where a sequence stands; only RUNNING ones hold blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """State of one choice of one request.

    ``sequence_id`` grows in order of arrival, so a smaller id is an older sequence. ``tokens`` are prompt and
    emitted tokens. ``num_computed`` counts positions whose keys and values are in the cache or will be once the
    steps already sent have run; stages run steps in the order sent, so no later step can tell the difference. It may
    be one more than there are known tokens: a step may compute the token that the step before it is still choosing.
    """

    sequence_id: int
    tokens: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    choice: int = 0
    eos_token_ids: tuple[int, ...] = ()
    request_id: str = ""
    adapter: str | None = None
    """The adapter that computes it; None for the model itself. Keys and values are shared under the same one only."""
    leader: "Sequence | None" = None
    """First choice of the same request: the others wait for its prompt, then share it through the prefix cache."""

    state: SequenceState = SequenceState.WAITING
    num_computed: int = 0
    blocks: tuple[int, ...] = ()
    num_registered: int = 0
    """Leading blocks that were offered to the prefix cache."""
    digests: list[bytes] = field(default_factory=list)
    """Digest chain over the full blocks of ``tokens``; grows on demand."""
    sample_steps: list[int] = field(default_factory=list)
    """The steps in flight that will bring this sequence's next tokens, in order; at most two."""
    announced: bool = False
    """The stages hold this sequence's SequenceStart."""
    num_cached: int | None = None
    """Prompt tokens that the prefix cache had when the sequence first ran; None before."""
    drafter: NgramDrafter = field(default_factory=NgramDrafter)

    @property
    def num_emitted(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Known tokens whose keys and values no step has been asked for yet."""
        return max(0, len(self.tokens) - self.num_computed)

    @property
    def may_decode(self) -> bool:
        """Whether one more position may be asked for: its token is known, or is being chosen and not the last one."""
        if self.num_computed > len(self.tokens):
            return False
        return self.num_emitted + len(self.sample_steps) < self.sampling.max_tokens

    @property
    def waits_for_leader(self) -> bool:
        """Whether the prompt that this sequence will share is still being computed."""
        leader = self.leader
        if leader is None or self.num_cached is not None or leader.state is SequenceState.FINISHED:
            return False
        return leader.num_computed < leader.num_prompt_tokens

    def start(self) -> SequenceStart:
        """What the sampling stage must know before this sequence's next sample."""
        return SequenceStart(
            sequence_id=self.sequence_id,
            token_ids=tuple(self.tokens),
            num_prompt_tokens=self.num_prompt_tokens,
            sampling=self.sampling,
            seed=self.seed,
            choice=self.choice,
            eos_token_ids=self.eos_token_ids,
            request_id=self.request_id,
            adapter=self.adapter,
        )

    def advance(self, num_tokens: int, step: int, drafts: tuple[int, ...] = ()) -> SequenceStep:
        """Count the next ``num_tokens`` as computed by ``step``; asks for a sample when they are the last ones.

        Then ``drafts`` may follow them, which do not count before :meth:`take` has told that they were right.
        """
        start = self.num_computed
        stop = start + num_tokens
        chosen_in = self.sample_steps[-1] if start == len(self.tokens) else None
        assert num_tokens > 0, "a step must compute something; this is a bug"
        assert stop <= len(self.tokens) + (chosen_in is not None), "a step computes unknown tokens; this is a bug"
        self.num_computed = stop
        sample = stop >= len(self.tokens)
        assert sample or not drafts, "a draft follows the last known token; this is a bug"
        if sample:
            self.sample_steps.append(step)
        return SequenceStep(
            sequence_id=self.sequence_id,
            token_ids=(*self.tokens[start:stop], *drafts),
            position=start,
            block_ids=self.blocks,
            sample=sample,
            chosen_in=chosen_in,
            adapter=self.adapter,
            num_drafts=len(drafts),
        )

    def take(self, token_ids: Iterable[int]) -> None:
        """Append what the oldest of ``sample_steps`` brought; that step is no longer in flight.

        All but the last were its drafts, so their keys and values are in the cache, unless that was taken away.
        """
        num_before = len(self.tokens)
        self.tokens.extend(token_ids)
        if self.state is SequenceState.RUNNING:
            self.num_computed += len(self.tokens) - num_before - 1
        del self.sample_steps[0]

    def reset_for_recompute(self) -> None:
        """Forget all that can be recomputed; samples still in flight stay expected (they are valid tokens)."""
        self.state = SequenceState.WAITING
        self.num_computed = 0
        self.blocks = ()
        self.num_registered = 0
        self.announced = False
