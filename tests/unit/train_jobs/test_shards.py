"""Sequences on disk: what was written is read by number, and damage is noticed."""

from pathlib import Path

import numpy as np
import pytest

from cluster.errors import DataError
from cluster.runs.files import MANIFEST
from tests.support.prepared_data import write_data
from train_jobs.data.shards import Shards

SEQUENCES = [[[5, 6, 7], [8, 9]], [[1, 2, 3, 4, 5, 6]], [[9, 8]]]


def make(directory: Path, **options: object) -> Path:
    return write_data(directory, {"train": SEQUENCES, "eval": []}, sequence_tokens=6, vocab_size=10, **options)  # type: ignore[arg-type]


def test_sequences_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    shards = Shards.open(make(tmp_path), "train")
    assert len(shards) == 3
    batch = shards.read([2, 0, 0])
    assert batch.token_ids_BS.tolist() == [[9, 8, 0, 0, 0, 0], [5, 6, 7, 8, 9, 0], [5, 6, 7, 8, 9, 0]]
    assert batch.segments_BS.tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 2, 2, 0], [1, 1, 1, 2, 2, 0]]
    assert batch.loss_mask_BS.tolist() == [[0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0], [0, 1, 1, 0, 1, 0]]
    assert batch.num_bytes_B.tolist() == [2, 6, 6]
    assert batch.labels_B is None
    assert (batch.token_ids_BS.dtype, batch.loss_mask_BS.dtype) == (np.int32, np.uint8)
    batch.token_ids_BS[:] = 0
    assert shards.read([2]).token_ids_BS[0, 0] == 9, "a batch is a copy"


def test_labels_come_with_classify(tmp_path: Path) -> None:
    directory = make(tmp_path, task="classify", labels={"train": [1, 0, 1], "eval": []})
    labels = Shards.open(directory, "train").read(np.array([0, 1, 2])).labels_B
    assert labels is not None
    assert labels.tolist() == [1, 0, 1]
    assert Shards.open(directory, "train").manifest.labels == ("label0", "label1")


def test_the_sides_of_a_pair_have_the_same_numbers(tmp_path: Path) -> None:
    others = [[[3, 3]], [[4, 4]], [[5, 5]]]
    directory = make(tmp_path, task="dpo", rejected={"train": others, "eval": []})
    chosen, rejected = (Shards.open(directory, "train", side=side) for side in ("chosen", "rejected"))
    assert chosen.read([2]).token_ids_BS[0, :2].tolist() == [9, 8]
    assert rejected.read([2]).token_ids_BS[0, :2].tolist() == [5, 5]
    with pytest.raises(DataError, match="task dpo: open it with one of chosen, rejected"):
        Shards.open(directory, "train")


def test_a_weight_repeats_or_thins_out_an_input(tmp_path: Path) -> None:
    sequences = [[[number, 1]] for number in range(10)]
    weights = [(4, 2.5), (6, 0.5)]
    directory = write_data(tmp_path, {"train": sequences}, sequence_tokens=2, vocab_size=20, weights=weights)
    shards = Shards.open(directory, "train")
    rows = shards.sequence_numbers(range(len(shards)))
    assert rows.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 6, 8]
    assert shards.read([12, 3]).token_ids_BS[:, 0].tolist() == [8, 1]


def test_an_empty_split_opens(tmp_path: Path) -> None:
    shards = Shards.open(make(tmp_path), "eval")
    assert len(shards) == 0
    assert shards.read([]).token_ids_BS.shape == (0, 6)


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    shards = Shards.open(make(tmp_path), "train")
    for wrong in (3, -1):
        with pytest.raises(IndexError, match=f"train: no item {wrong}; there are 3"):
            shards.read([0, wrong])


def test_missing_data_and_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        Shards.open(tmp_path, "train")
    directory = make(tmp_path)
    with pytest.raises(DataError, match="no split 'test'; it has train, eval"):
        Shards.open(directory, "test")
    with pytest.raises(DataError, match="task lm: open it with no side"):
        Shards.open(directory, "train", side="chosen")


def test_a_file_of_another_size_is_refused_when_opened(tmp_path: Path) -> None:
    directory = make(tmp_path)
    with (directory / "train-tokens.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"train-tokens\.bin has 73 bytes, recorded with 72"):
        Shards.open(directory, "train")


def test_changed_bytes_are_found_on_request(tmp_path: Path) -> None:
    directory = make(tmp_path)
    shards = Shards.open(directory, "train")
    shards.verify()
    data = bytearray((directory / "train-loss.bin").read_bytes())
    data[0] ^= 1
    (directory / "train-loss.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"train-loss\.bin is damaged"):
        Shards.open(directory, "train").verify()


def test_an_unreadable_manifest_is_refused(tmp_path: Path) -> None:
    directory = make(tmp_path)
    manifest = directory / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(DataError, match="not a manifest this Manta can read"):
        Shards.open(directory, "train")
