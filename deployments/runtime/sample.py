"""Where a token is chosen: logits in, one token per row out, as a pure function of (logits, params, seed, position).

Nothing depends on which batch a sequence was in: every operation is row-wise, and randomness comes from a
counter-based generator (Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by
(seed, choice) and counted by position. Truncation only sets probabilities to zero; the draw is always by inverse
transform over the vocabulary in id order. Notation: R rows, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch

from deployments.messages import Sample, SamplingParams, SequenceStart
from deployments.runtime.grammar import Constraint, EndRules, GrammarCompiler, GrammarError

_TOP_P_CANDIDATES = 256
_COLDEST = torch.finfo(torch.float32).tiny  # colder is the same distribution, and zero in float32


class SequenceSampler:
    """What sampling must remember of one sequence: parameters, which tokens it has seen, where its grammar stands."""

    def __init__(self, start: SequenceStart, grammars: GrammarCompiler | None = None) -> None:
        self.sampling: SamplingParams = start.sampling
        self.sequence_id = start.sequence_id
        self._key = (start.seed % 2**64, start.choice)
        self._position = len(start.token_ids)
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
        """The number in [0, 1) that decides the next token."""
        generator = np.random.Philox(key=np.array(self._key, dtype=np.uint64), counter=self._position)
        return float(generator.random_raw() >> 11) * 2.0**-53

    def adjust(self, logits_V: torch.Tensor) -> None:
        """Apply penalties, bias, minimum length and grammar in place.

        The grammar comes last, so that no bias can let in what it forbids; it takes the minimum length into account
        itself. Repetition penalty as in CTRL (Keskar et al. 2019) over prompt and output; presence and frequency
        penalties as OpenAI defines them, over the output.
        """
        sampling = self.sampling
        if sampling.repetition_penalty != 1.0:
            ids = torch.tensor(list(self._seen), device=logits_V.device)
            seen = logits_V[ids]
            logits_V[ids] = torch.where(
                seen < 0, seen * sampling.repetition_penalty, seen / sampling.repetition_penalty
            )
        if self._emitted and (sampling.presence_penalty or sampling.frequency_penalty):
            ids = torch.tensor(list(self._emitted), device=logits_V.device)
            counts = torch.tensor(list(self._emitted.values()), dtype=logits_V.dtype, device=logits_V.device)
            logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        for token_id, bias in sampling.logit_bias.items():
            logits_V[token_id] += bias
        if self.constraint is not None:
            self._constrain(self.constraint, logits_V)
        elif self._num_emitted < sampling.min_tokens:
            logits_V[list({*self._eos, *sampling.stop_token_ids})] = -torch.inf

    def _constrain(self, constraint: Constraint, logits_V: torch.Tensor) -> None:
        try:
            mask = constraint.mask()
        except GrammarError as error:
            self.problem = str(error)
            return
        num_known = min(len(mask), len(logits_V))  # a model may have more rows than tokens, or fewer
        allowed = torch.from_numpy(mask[:num_known]).to(logits_V.device)
        logits_V[:num_known].masked_fill_(~allowed, -torch.inf)
        logits_V[num_known:] = -torch.inf

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

    def start(self, start: SequenceStart) -> None:
        """Begin or resume a sequence; a resumed one replaces what was known of it."""
        self._sequences[start.sequence_id] = SequenceSampler(start, self._grammars)

    def end(self, sequence_id: int) -> None:
        """Forget a sequence; unknown ids are fine (it may have ended before it was ever sampled)."""
        self._sequences.pop(sequence_id, None)

    def sample(self, sequence_ids: Sequence[int], logits_RV: torch.Tensor) -> list[Sample]:
        """One token per row; KeyError for a sequence that was never started."""
        rows = [self._sequences[sequence_id] for sequence_id in sequence_ids]
        raw_RV = logits_RV.float()
        token_ids = choose(rows, raw_RV)
        samples = []
        for index, (row, token_id) in enumerate(zip(rows, token_ids, strict=True)):
            logprob, top = _logprobs(row.sampling.logprobs, raw_RV[index], token_id)
            ended = row.append(token_id)
            samples.append(Sample(row.sequence_id, token_id, logprob, top, ended, row.problem))
        return samples


def choose(rows: Sequence[SequenceSampler], raw_RV: torch.Tensor) -> list[int]:
    """The chosen token id of each row; ``raw_RV`` (float32) is left as it is."""
    logits_RV = raw_RV
    if any(row.adjusts for row in rows):
        logits_RV = raw_RV.clone()
        for index, row in enumerate(rows):
            if row.adjusts:
                row.adjust(logits_RV[index])
    chosen = torch.argmax(logits_RV, dim=-1)
    drawn = [index for index, row in enumerate(rows) if not row.is_greedy]
    if drawn:
        drawn_rows = torch.tensor(drawn, device=logits_RV.device)
        chosen[drawn_rows] = _draw([rows[i] for i in drawn], logits_RV[drawn_rows])
    return chosen.tolist()


def _draw(rows: list[SequenceSampler], logits_RV: torch.Tensor) -> torch.Tensor:
    device = logits_RV.device
    temperature = torch.tensor([max(row.sampling.temperature, _COLDEST) for row in rows], device=device)
    # the best logit becomes zero first: divided by a temperature near zero it would overflow
    relative_RV = logits_RV - logits_RV.amax(dim=-1, keepdim=True)
    probs_RV = torch.softmax(relative_RV / temperature[:, None], dim=-1)
    floors = [_floor(row.sampling, probs_RV[index]) for index, row in enumerate(rows)]
    if any(floor > 0.0 for floor in floors):
        floor_R1 = torch.tensor(floors, device=device)[:, None]
        probs_RV = torch.where(probs_RV >= floor_R1, probs_RV, 0.0)
    cdf_RV = torch.cumsum(probs_RV, dim=-1, dtype=torch.float64)
    uniform = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=device)
    target_R1 = (uniform * cdf_RV[:, -1])[:, None]
    # right=True: the first id whose cumulative probability exceeds the target, so never one of probability zero
    return torch.searchsorted(cdf_RV, target_R1, right=True).squeeze(-1).clamp_(max=cdf_RV.shape[-1] - 1)


def _floor(sampling: SamplingParams, probs_V: torch.Tensor) -> float:
    """The smallest probability that survives min_p, then top_k, then top_p; tokens that tie with it survive too."""
    floor = 0.0
    if sampling.min_p > 0.0:
        floor = max(floor, float(probs_V.max()) * sampling.min_p)
    if sampling.top_k is not None and sampling.top_k < len(probs_V):
        floor = max(floor, float(probs_V.topk(sampling.top_k).values[-1]))
    if sampling.top_p < 1.0:
        floor = max(floor, _nucleus_floor(probs_V, floor, sampling.top_p))
    return floor


def _nucleus_floor(probs_V: torch.Tensor, floor: float, top_p: float) -> float:
    """Nucleus sampling (Holtzman et al. 2020): the fewest most likely tokens whose probability reaches ``top_p``."""
    surviving = torch.where(probs_V >= floor, probs_V, 0.0)
    target = float(surviving.sum(dtype=torch.float64)) * top_p
    for num_candidates in (min(_TOP_P_CANDIDATES, len(probs_V)), len(probs_V)):
        best = surviving.topk(num_candidates).values
        reached = torch.cumsum(best, dim=-1, dtype=torch.float64) >= target
        if bool(reached.any()):
            return float(best[int(reached.int().argmax())])
    return floor


def _logprobs(
    num_top: int | None, logits_V: torch.Tensor, token_id: int
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Log-probabilities of the model's own distribution, before bias, penalties and temperature."""
    if num_top is None:
        return None, ()
    logprobs = torch.log_softmax(logits_V, dim=-1)
    best = logprobs.topk(num_top) if num_top else None
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else ()
    return float(logprobs[token_id]), top
