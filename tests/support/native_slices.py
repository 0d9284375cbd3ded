"""Slices on the native kernels, and steps for them."""

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from deployments.messages import SequenceStep
from deployments.runtime.native.architecture import NotNativeError
from deployments.runtime.native.build import load_library
from deployments.runtime.native.slice import NativeSlice
from deployments.runtime.quantize import Quantization
from deployments.runtime.settings import RunnerConfig, StageSlice

NUM_BLOCKS = 96


def reason_against_native() -> str | None:
    """Why this machine cannot run the native kernels; None where it can."""
    try:
        load_library()
    except NotNativeError as error:
        if "cannot compile the kernels" in str(error):
            raise  # the kernels' fault, not the machine's
        return str(error)
    return None


needs_native = pytest.mark.skipif(reason_against_native() is not None, reason=str(reason_against_native()))


def load_native(
    directory: Path,
    borders: Sequence[int],
    *,
    quantization: Quantization | None = None,
    num_threads: int = 2,
    block_tokens: int = 16,
    context_tokens: int = 256,
    adapters: Mapping[str, Path] | None = None,
) -> list[NativeSlice]:
    """One slice per pair of neighbouring ``borders``."""
    return [
        NativeSlice(
            RunnerConfig(
                directory=directory,
                part=StageSlice(start=start, stop=stop, is_first=start == 0, is_last=stop == borders[-1]),
                dtype=torch.bfloat16,
                device=torch.device("cpu"),
                context_tokens=context_tokens,
                num_blocks=NUM_BLOCKS,
                block_tokens=block_tokens,
                quantization=quantization,
                num_threads=num_threads,
                adapters=adapters or {},
            )
        )
        for start, stop in pairwise(borders)
    ]


def run_through(
    slices: Sequence[NativeSlice], step: Sequence[SequenceStep], *, every_row: bool = False
) -> torch.Tensor:
    """Logits that the last slice makes of a step."""
    hidden = None
    for each in slices:
        hidden = each.compute(step, hidden, every_row)
    assert hidden is not None
    return hidden


def scattered_blocks(num_tokens: int, *, seed: int = 0, block_tokens: int = 16) -> tuple[int, ...]:
    """A block table that covers ``num_tokens``, out of order."""
    blocks = list(range(NUM_BLOCKS))
    random.Random(seed).shuffle(blocks)
    return tuple(blocks[: -(-num_tokens // block_tokens)])


def all_logits(
    slices: Sequence[NativeSlice],
    tokens: Sequence[int],
    *,
    chunk: int | None = None,
    blocks: Sequence[int] | None = None,
) -> torch.Tensor:
    """Logits after each of ``tokens``, computed ``chunk`` at a time: [num_tokens, vocab_size]."""
    table = tuple(blocks) if blocks is not None else scattered_blocks(len(tokens))
    rows = []
    for start in range(0, len(tokens), chunk or len(tokens)):
        part = tuple(tokens[start : start + (chunk or len(tokens))])
        rows.append(run_through(slices, [SequenceStep(0, part, start, table, True)], every_row=True))
    return torch.cat(rows)


def random_tokens(num_tokens: int, *, seed: int = 0, vocab_size: int = 320) -> list[int]:
    """Token ids."""
    generator = random.Random(seed)
    return [generator.randrange(vocab_size) for _ in range(num_tokens)]
