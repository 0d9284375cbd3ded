"""A model without any sense under a grammar: logits by position alone, sampled as a stage and its replica would."""

import torch

from deployments.messages import SequenceStart
from deployments.runtime.grammar import GrammarCompiler
from deployments.runtime.sample import Sampler

VOCABULARY = 280
"""Logits have more rows than the tiny tokenizer has tokens, as padded embeddings do."""


def logits(seed: int, position: int) -> torch.Tensor:
    """What a model without any sense says, as a function of the position."""
    generator = torch.Generator().manual_seed(seed * 1000 + position)
    return torch.randn((1, VOCABULARY), generator=generator) * 3


def run(
    compiler: GrammarCompiler, begin: SequenceStart, *, seed: int = 0, bias: dict[int, float] | None = None
) -> tuple[list[int], bool]:
    """Tokens until the sequence ends or has 400, as a stage and its replica would; and whether it ended."""
    sampler = Sampler(compiler)
    sampler.start(begin)
    tokens = list(begin.token_ids[begin.num_prompt_tokens :])
    while len(tokens) < 400:
        row = logits(seed, len(tokens))
        for token_id, value in (bias or {}).items():
            row[0, token_id] += value
        sample = sampler.sample([1], row)[0]
        assert sample.problem is None, sample.problem
        tokens.append(sample.token_id)
        if sample.ended:
            return tokens, True
    return tokens, False
