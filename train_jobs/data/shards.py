"""A committed directory of prepared data enters, batches of sequences by their numbers leave.

Shapes: B sequences, S tokens of a sequence (``sequence_tokens``). The arrays are raw, row after row, little-endian,
and memory-mapped, so that opening costs nothing and workers of one node share the pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.errors import DataError
from cluster.runs.prepared import (
    SIDES,
    Manifest,
    MixPart,
    Side,
    array_name,
    check_size,
    read_manifest,
    verify_files,
)

TOKENS_DTYPE = np.dtype("<i4")
SEGMENTS_DTYPE = np.dtype("<i4")
LOSS_DTYPE = np.dtype("u1")
LABELS_DTYPE = np.dtype("<i4")
BYTES_DTYPE = np.dtype("<i8")

Indices = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """A batch of sequences."""

    token_ids_BS: NDArray[np.int32]
    segments_BS: NDArray[np.int32]
    """Number of the document that a position belongs to, from 1 within each sequence; 0 is padding, which is always
    at the end. Attention must not cross."""
    loss_mask_BS: NDArray[np.uint8]
    """1 where the token is a target, that is to be predicted from the tokens before it in its own segment. The first
    token of a segment never is one."""
    labels_B: NDArray[np.int32] | None
    """Number of the label of each sequence; None unless the task is classify."""
    num_bytes_B: NDArray[np.int64]
    """UTF-8 bytes of the text that the targets of each sequence spell."""

    def __len__(self) -> int:
        return len(self.token_ids_BS)


class Shards:
    """One split of prepared data. ``len()`` is the number of items of one epoch, which ``read`` takes numbers of.

    An item is a sequence; where an input has a weight other than 1, its sequences come up that often.
    """

    def __init__(self, directory: Path, manifest: Manifest, split: str, side: Side | None) -> None:
        self.directory = directory
        self.manifest = manifest
        self.split = split
        self.side = side
        self.sequence_tokens = manifest.sequence_tokens
        entry = manifest.split(split)
        self.num_sequences = entry.num_sequences
        self._num_items = entry.num_items
        self._parts = entry.parts
        self._starts = np.cumsum([0, *(part.num_items for part in entry.parts)], dtype=np.int64)
        self._tokens = self._map("tokens", TOKENS_DTYPE, per_token=True)
        self._segments = self._map("segments", SEGMENTS_DTYPE, per_token=True)
        self._loss = self._map("loss", LOSS_DTYPE, per_token=True)
        self._bytes = self._map("bytes", BYTES_DTYPE, per_token=False)
        self._labels = self._map("labels", LABELS_DTYPE, per_token=False) if manifest.task == "classify" else None

    @classmethod
    def open(cls, directory: Path, split: str, *, side: Side | None = None) -> "Shards":
        """The split of a committed directory; ``side`` is chosen or rejected for dpo, and None otherwise.

        DataError when there is no such data, or a file has another size than the manifest says.
        """
        manifest = read_manifest(directory)
        if (side is None) == (manifest.task == "dpo"):
            wanted = f"one of {', '.join(SIDES)}" if side is None else "no side"
            raise DataError(f"data {manifest.name} is for task {manifest.task}: open it with {wanted}")
        for entry in manifest.files:
            check_size(directory, entry)
        return cls(directory, manifest, split, side)

    def __len__(self) -> int:
        return self._num_items

    def read(self, indices: Indices) -> Sequences:
        """The items with these numbers, in this order, as copies; IndexError for one that is not below ``len()``."""
        rows = self.sequence_numbers(indices)
        return Sequences(
            token_ids_BS=self._tokens[rows],
            segments_BS=self._segments[rows],
            loss_mask_BS=self._loss[rows],
            labels_B=None if self._labels is None else self._labels[rows],
            num_bytes_B=self._bytes[rows],
        )

    def sequence_numbers(self, indices: Indices) -> NDArray[np.int64]:
        """Where the items lie on disk: the row of each."""
        items = np.asarray(indices, dtype=np.int64)
        if items.size and (items.min() < 0 or items.max() >= self._num_items):
            wrong = items[(items < 0) | (items >= self._num_items)][0]
            raise IndexError(f"{self.split}: no item {wrong}; there are {self._num_items}")
        rows = np.empty_like(items)
        which = np.searchsorted(self._starts, items, side="right") - 1
        for number, part in enumerate(self._parts):
            chosen = which == number
            rows[chosen] = _rows(part, items[chosen] - self._starts[number])
        return rows

    def verify(self) -> None:
        """Read every file of the directory; DataError naming the first whose digest is not the recorded one."""
        verify_files(self.directory, self.manifest)

    def _map(self, kind: str, dtype: np.dtype, *, per_token: bool) -> NDArray:  # type: ignore[type-arg]
        path = self.directory / array_name(self.split, kind, self.side)
        shape = (self.num_sequences, self.sequence_tokens) if per_token else (self.num_sequences,)
        expected = int(np.prod(shape)) * dtype.itemsize
        if not path.is_file() or path.stat().st_size != expected:
            raise DataError(f"{path}: expected {expected} bytes for {self.num_sequences} sequences; prepare it again")
        if self.num_sequences == 0:
            return np.empty(shape, dtype=dtype)  # an empty file cannot be mapped
        return np.memmap(path, dtype=dtype, mode="r", shape=shape).view(np.ndarray)


def _rows(part: MixPart, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Spread the part's items evenly over its sequences: each as often as the next, give or take one."""
    return part.first_sequence + offsets * part.num_sequences // max(part.num_items, 1)
