"""Pieces are packed whole, fit, and fill the sequences well; documents are split by their own hash."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.prepared_data import piece
from train_jobs.data.packing import Packer
from train_jobs.data.shard_writer import Piece
from train_jobs.data.spec import SplitSpec
from train_jobs.data.splitting import content_hash, split_of


def pack(sizes: list[int], sequence_tokens: int, max_open_bins: int) -> list[list[Piece]]:
    packer = Packer(sequence_tokens, max_open_bins=max_open_bins)
    full = []
    for number, size in enumerate(sizes):
        full += packer.add(piece([number] * size))
    return full + packer.flush()


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(1, 20), max_size=60), max_open_bins=st.integers(1, 10))
def test_every_piece_is_packed_once_and_fits(sizes: list[int], max_open_bins: int) -> None:
    sequences = pack(sizes, 20, max_open_bins)
    packed = [(int(each.token_ids_P[0]), len(each)) for sequence in sequences for each in sequence]
    assert sorted(packed) == list(enumerate(sizes))
    assert all(0 < sum(len(each) for each in sequence) <= 20 for sequence in sequences)


def test_best_fit_fills_what_the_next_that_fits_would_leave_open() -> None:
    sizes = np.random.default_rng(0).integers(2, 512, 5000).tolist()
    full = len(pack(sizes, 512, 1024))
    in_order = len(pack(sizes, 512, 1))
    assert sum(sizes) / (full * 512) > 0.97
    assert full < 0.85 * in_order


def test_a_document_stays_in_its_split() -> None:
    keys = [content_hash(str(number)) for number in range(4000)]
    spec = SplitSpec(eval_fraction=0.2, seed=0)
    splits = [split_of(key, spec) for key in keys]
    assert 700 < splits.count("eval") < 900
    assert [split_of(key, spec) for key in keys[::-1]] == splits[::-1]
    other = [split_of(key, SplitSpec(eval_fraction=0.2, seed=1)) for key in keys]
    both = sum(one == two == "eval" for one, two in zip(splits, other, strict=True))
    assert 100 < both < 220, "another seed holds out others"
    larger = [split_of(key, SplitSpec(eval_fraction=0.3, seed=0)) for key in keys]
    assert all(new == "eval" for old, new in zip(splits, larger, strict=True) if old == "eval")


def test_a_hash_tells_where_parts_end() -> None:
    assert content_hash("ab", "c") != content_hash("a", "bc")
    assert content_hash("abc") != content_hash("abc", "")
