"""``python -m tests.bench packing``: what packing short documents saves, beside what the padding alone would predict.

The same documents, one to a sequence and padded, or packed, pass forward and backward through the same small Llama in
turns in one process.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from train_jobs.data.packing import Packer
from train_jobs.data.shard_writer import Piece
from train_jobs.tasks.language import LanguageModel

VOCABULARY = 4096
GOAL = 0.95


@dataclass(frozen=True)
class Sequences:
    """Documents laid out in rows; segments are numbered from 1, 0 is padding."""

    token_ids_BS: torch.Tensor  # noqa: N815
    segments_BS: torch.Tensor  # noqa: N815
    loss_mask_BS: torch.Tensor  # noqa: N815


def documents(number: int, longest: int) -> list[Piece]:
    """Of 8 to ``longest`` tokens, short ones as frequent as long ones on a logarithmic scale."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.uniform(np.log(8), np.log(longest), number)).astype(int)
    return [
        Piece(
            token_ids_P=random.integers(0, VOCABULARY, length).astype(np.int32),
            loss_mask_P=np.r_[0, np.ones(length - 1)].astype(np.uint8),
            num_bytes=0,
        )
        for length in lengths
    ]


def lay_out(rows: list[list[Piece]], sequence_tokens: int) -> Sequences:
    """Each row's documents one after the other, then padding."""
    shape = (len(rows), sequence_tokens)
    ids, segments, mask = (np.zeros(shape, np.int64), np.zeros(shape, np.int32), np.zeros(shape, bool))
    for row, pieces in enumerate(rows):
        at = 0
        for number, piece in enumerate(pieces, 1):
            part = slice(at, at + len(piece))
            ids[row, part], segments[row, part], mask[row, part] = piece.token_ids_P, number, piece.loss_mask_P
            at += len(piece)
    return Sequences(torch.from_numpy(ids), torch.from_numpy(segments), torch.from_numpy(mask))


def packed(pieces: list[Piece], sequence_tokens: int) -> list[list[Piece]]:
    """As a prepare job packs them."""
    packer = Packer(sequence_tokens)
    rows = [row for piece in pieces for row in packer.add(piece)]
    return rows + packer.flush()


def pass_over(model: LanguageModel, sequences: Sequences, rows_at_once: int) -> float:
    """Seconds for all rows, forward and backward."""
    began = time.perf_counter()
    parts = zip(
        *(
            tensor.split(rows_at_once)
            for tensor in (sequences.token_ids_BS, sequences.segments_BS, sequences.loss_mask_BS)
        ),
        strict=True,
    )
    for token_ids_BS, segments_BS, loss_mask_BS in parts:
        nats_N, _ = model(token_ids_BS, segments_BS, loss_mask_BS)
        nats_N.sum().backward()
    return time.perf_counter() - began


def main() -> None:
    """Measure in turns, print both ratios."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LanguageModel(LlamaForCausalLM(config))
    pieces = documents(arguments.documents, arguments.sequence_tokens)
    padded_rows = lay_out([[piece] for piece in pieces], arguments.sequence_tokens)
    packed_rows = lay_out(packed(pieces, arguments.sequence_tokens), arguments.sequence_tokens)
    pass_over(model, packed_rows, arguments.rows)
    ratios = []
    for _ in range(arguments.repeat):
        padded_s = pass_over(model, padded_rows, arguments.rows)
        ratios.append(padded_s / pass_over(model, packed_rows, arguments.rows))
    tokens = sum(map(len, pieces))
    predicted = padded_rows.token_ids_BS.numel() / tokens
    fill = tokens / packed_rows.token_ids_BS.numel()
    measured = statistics.median(ratios)
    Console(width=100).print(
        f"{len(pieces)} documents, {tokens} tokens; packed sequences are {fill:.1%} full\n"
        f"padded positions / real tokens: {predicted:.2f}\n"
        f"speed-up by packing, median of {len(ratios)}: {measured:.2f}\n"
        f"ratio: {measured / predicted:.3f} (goal >= {GOAL})"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.bench packing")
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--sequence-tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8, help="sequences of one forward pass")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
