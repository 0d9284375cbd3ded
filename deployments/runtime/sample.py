"""Where a token is chosen: logits in, one token per row out, as a pure function of (logits, params, seed, position).

Nothing depends on which batch a sequence was in: every operation is row-wise, and randomness comes from a
counter-based generator (Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by
(seed, choice) and counted by position. Truncation only sets probabilities to zero; the draw is always by inverse
transform over the vocabulary in id order. Notation: R rows, V vocabulary.

Greedy rows of plain requests are chosen where the logits are; all else is NumPy on the processor, one row at a time,
which for a vocabulary of 49152 is five to ten times faster than torch's operators.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.messages import Sample, SamplingParams, SequenceStart
from deployments.runtime.grammar import Constraint, EndRules, GrammarCompiler, GrammarError

_COLDEST = float(np.finfo(np.float32).tiny)  # colder is the same distribution, and zero in float32
_BLOCK_TOKENS = 256  # the sums of so many weights are searched first, then the weights of one block
_NUCLEUS_CUTS = (2.0**-5, 2.0**-10, 2.0**-15)  # of the largest weight: above the first that suffices, all are sorted

Row = NDArray[np.float32]


class SequenceSampler:
    """What sampling must remember of one sequence: parameters, which tokens it has seen, where its grammar stands."""

    def __init__(self, start: SequenceStart, grammars: GrammarCompiler | None = None) -> None:
        self.sampling: SamplingParams = start.sampling
        self.sequence_id = start.sequence_id
        self._position = len(start.token_ids)
        self._numbers = np.random.Philox(
            key=np.array((start.seed % 2**64, start.choice), dtype=np.uint64), counter=self._position
        )
        self._numbers_position = self._position
        self._num_emitted = len(start.token_ids) - start.num_prompt_tokens
        self._eos = start.eos_token_ids
        self._seen = dict.fromkeys(start.token_ids, None)
        self._emitted: dict[int, int] = {}
        for token_id in start.token_ids[start.num_prompt_tokens :]:
            self._emitted[token_id] = self._emitted.get(token_id, 0) + 1
        self.constraint = _constrain(start, grammars)
        self.problem: str | None = None
        """Why the grammar cannot go on."""

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken (after penalties)."""
        return self.sampling.temperature == 0.0

    def uniform(self) -> float:
        """The number in [0, 1) that decides the next token: of the four of its position's counter, the first."""
        if self._position != self._numbers_position:
            self._numbers.advance(self._position - self._numbers_position)
        self._numbers_position = self._position + 1
        return float(self._numbers.random_raw(4)[0] >> 11) * 2.0**-53

    def adjust(self, logits_V: Row) -> None:
        """Apply penalties, bias, minimum length and grammar in place.

        The grammar comes last, so that no bias can let in what it forbids; it takes the minimum length into account
        itself. Repetition penalty as in CTRL (Keskar et al. 2019) over prompt and output; presence and frequency
        penalties as OpenAI defines them, over the output.
        """
        sampling = self.sampling
        if sampling.repetition_penalty != 1.0:
            ids = np.fromiter(self._seen, dtype=np.int64, count=len(self._seen))
            seen = logits_V[ids]
            penalty = np.float32(sampling.repetition_penalty)
            logits_V[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
        if self._emitted and (sampling.presence_penalty or sampling.frequency_penalty):
            num_ids = len(self._emitted)
            ids = np.fromiter(self._emitted, dtype=np.int64, count=num_ids)
            counts = np.fromiter(self._emitted.values(), dtype=np.float32, count=num_ids)
            logits_V[ids] -= np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * counts
        for token_id, bias in sampling.logit_bias.items():
            logits_V[token_id] += np.float32(bias)
        if self.constraint is not None:
            self._constrain(self.constraint, logits_V)
        elif self._num_emitted < sampling.min_tokens:
            logits_V[list({*self._eos, *sampling.stop_token_ids})] = -np.inf

    def _constrain(self, constraint: Constraint, logits_V: Row) -> None:
        try:
            mask = constraint.mask()
        except GrammarError as error:
            self.problem = str(error)
            return
        num_known = min(len(mask), len(logits_V))  # a model may have more rows than tokens, or fewer
        np.copyto(logits_V[:num_known], -np.inf, where=~mask[:num_known])
        logits_V[num_known:] = -np.inf

    @property
    def adjusts(self) -> bool:
        """Whether :meth:`adjust` would change anything."""
        sampling = self.sampling
        return (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
            or bool(sampling.logit_bias)
            or self._num_emitted < sampling.min_tokens
            or self.constraint is not None
        )

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token of the model's own distribution is all that is wanted."""
        return self.is_greedy and self.sampling.logprobs is None and not self.adjusts

    def append(self, token_id: int) -> bool:
        """Note that ``token_id`` was chosen; True when the grammar allows nothing after it."""
        self._position += 1
        self._num_emitted += 1
        self._seen[token_id] = None
        self._emitted[token_id] = self._emitted.get(token_id, 0) + 1
        return self.constraint is not None and self.problem is None and self.constraint.accept(token_id)


def _constrain(start: SequenceStart, grammars: GrammarCompiler | None) -> Constraint | None:
    sampling, grammar = start.sampling, start.sampling.grammar
    if grammar is None:
        return None
    assert grammars is not None, "a stage that samples has a grammar compiler; this is a bug"
    rules = EndRules(
        grammar.end_token_ids, sampling.stop_token_ids, sampling.min_tokens, ignore_eos=sampling.ignore_eos
    )
    return Constraint(grammars, grammar, start.token_ids[start.num_prompt_tokens :], rules)


class Sampler:
    """The sampling state of every sequence that the last stage serves."""

    def __init__(self, grammars: GrammarCompiler | None = None) -> None:
        """``grammars`` compiles those of constrained sequences; None where there will be none."""
        self._grammars = grammars
        self._sequences: dict[int, SequenceSampler] = {}
        self._scratch_V: Row = np.empty(0, dtype=np.float32)  # new memory for each row costs as much as the sums

    def start(self, start: SequenceStart) -> None:
        """Begin or resume a sequence; a resumed one replaces what was known of it."""
        self._sequences[start.sequence_id] = SequenceSampler(start, self._grammars)

    def end(self, sequence_id: int) -> None:
        """Forget a sequence; unknown ids are fine (it may have ended before it was ever sampled)."""
        self._sequences.pop(sequence_id, None)

    def sample(
        self,
        sequence_ids: Sequence[int],
        logits_RV: torch.Tensor,
        drafts: Mapping[int, tuple[int, ...]] = MappingProxyType({}),
    ) -> list[Sample]:
        """One token of each sequence; of one that has ``drafts``, all up to the first that is not the draft there.

        A sequence has one row, and one more after each draft. KeyError for a sequence that was never started.
        """
        sequences = [self._sequences[sequence_id] for sequence_id in sequence_ids]
        if logits_RV.device.type != "cpu" and all(sequence.is_plain for sequence in sequences):
            best, logits = torch.argmax(logits_RV, dim=-1).tolist(), None
        else:
            logits = logits_RV.float().cpu().numpy()
            best = np.argmax(logits, axis=-1).tolist()
            if len(self._scratch_V) != logits.shape[-1]:
                self._scratch_V = np.empty(logits.shape[-1], dtype=np.float32)
        samples: list[Sample] = []
        first_row = 0
        for sequence in sequences:
            own_drafts = drafts.get(sequence.sequence_id, ())
            for row, draft in enumerate((*own_drafts, None), start=first_row):
                if logits is None or sequence.is_plain:
                    samples.append(_plain_sample(sequence, best[row]))
                else:
                    samples.append(_sample(sequence, logits[row], self._scratch_V))
                if samples[-1].token_id != draft or samples[-1].ended or samples[-1].problem is not None:
                    break
            first_row += len(own_drafts) + 1
        return samples


def _plain_sample(row: SequenceSampler, token_id: int) -> Sample:
    row.append(token_id)
    return Sample(row.sequence_id, token_id)


def _sample(row: SequenceSampler, raw_V: Row, scratch_V: Row) -> Sample:
    token_id = choose(row, raw_V, scratch_V)
    logprob, top = _logprobs(row.sampling.logprobs, raw_V, token_id)
    ended = row.append(token_id)
    return Sample(row.sequence_id, token_id, logprob, top, ended, row.problem)


def choose(row: SequenceSampler, raw_V: Row, scratch_V: Row) -> int:
    """The token id that ``row`` chooses; ``raw_V`` is left as it is, ``scratch_V`` is written over."""
    logits_V = raw_V
    if row.adjusts:
        logits_V = raw_V.copy()
        row.adjust(logits_V)
    if row.is_greedy:
        return int(logits_V.argmax())
    _weigh(logits_V, row.sampling.temperature, scratch_V)
    floor = _floor(row.sampling, scratch_V)
    if floor == 0.0:
        return _draw(scratch_V, row.uniform())
    survivors = np.flatnonzero(scratch_V >= floor)
    return int(survivors[_draw(scratch_V[survivors], row.uniform())])


def _weigh(logits_V: Row, temperature: float, weights_V: Row) -> None:
    """The distribution at a temperature, relative to its largest value, which becomes 1."""
    # The best logit becomes zero first, and stays so however cold it is; another may overflow to a weight of zero.
    np.subtract(logits_V, logits_V.max(), out=weights_V)
    with np.errstate(over="ignore"):
        weights_V /= np.float32(max(temperature, _COLDEST))
    np.exp(weights_V, out=weights_V)


def _draw(weights_V: Row, uniform: float) -> int:
    """The token into whose part of the distribution ``uniform`` falls, by inverse transform in id order."""
    starts = np.arange(0, len(weights_V), _BLOCK_TOKENS)
    sums = np.add.reduceat(weights_V, starts, dtype=np.float64)
    cumulative = np.cumsum(sums)
    target = uniform * cumulative[-1]
    block = _first_above(cumulative, target)
    before = cumulative[block - 1] if block else 0.0
    start = block * _BLOCK_TOKENS
    inside = np.cumsum(weights_V[start : start + _BLOCK_TOKENS], dtype=np.float64)
    return start + _first_above(inside, target - before)


def _first_above(cumulative: NDArray[np.float64], target: float) -> int:
    """The first index whose cumulative weight exceeds ``target``, so never one of weight zero.

    Where rounding puts the target at the end, it is the last of some weight.
    """
    index = int(np.searchsorted(cumulative, target, side="right"))
    return index if index < len(cumulative) else int(np.searchsorted(cumulative, cumulative[-1], side="left"))


def _floor(sampling: SamplingParams, weights_V: Row) -> float:
    """The smallest weight that survives min_p, then top_k, then top_p; tokens that tie with it survive too."""
    floor = sampling.min_p  # of the largest weight, which is 1
    if sampling.top_k is not None and sampling.top_k < len(weights_V):
        floor = max(floor, float(np.partition(weights_V, -sampling.top_k)[-sampling.top_k]))
    if sampling.top_p < 1.0:
        floor = max(floor, _nucleus_floor(weights_V, floor, sampling.top_p))
    return floor


def _nucleus_floor(weights_V: Row, floor: float, top_p: float) -> float:
    """Nucleus sampling (Holtzman et al. 2020): the fewest most likely tokens whose weight reaches ``top_p``."""
    if floor > 0.0:
        weights_V = weights_V[weights_V >= floor]
    target = float(weights_V.sum(dtype=np.float64)) * top_p
    for cut in (*_NUCLEUS_CUTS, 0.0):
        candidates = weights_V[weights_V >= cut]
        if cut == 0.0 or float(candidates.sum(dtype=np.float64)) >= target:
            break
    best = np.sort(candidates)[::-1]
    reached = int(np.searchsorted(np.cumsum(best, dtype=np.float64), target, side="left"))
    return float(best[min(reached, len(best) - 1)])


def _logprobs(
    num_top: int | None, logits_V: Row, token_id: int
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Log-probabilities of the model's own distribution, before bias, penalties and temperature."""
    if num_top is None:
        return None, ()
    largest = logits_V.max()
    total = float(largest) + float(np.log(np.exp(logits_V - largest).sum(dtype=np.float64)))
    num_top = min(num_top, len(logits_V))
    best = np.argpartition(logits_V, -num_top)[-num_top:] if num_top else np.empty(0, dtype=np.int64)
    ranked = sorted(((int(i), float(logits_V[i]) - total) for i in best), key=lambda each: (-each[1], each[0]))
    return float(logits_V[token_id]) - total, tuple(ranked)
