"""Packed sequences enter, the raw arrays of one split leave, with the size and digest of each.

Every file is hashed as it is written; what is not closed counts for nothing, since the manifest does not name it.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.runs.prepared import FileEntry, Side, array_name
from train_jobs.data.shards import BYTES_DTYPE, LABELS_DTYPE, LOSS_DTYPE, SEGMENTS_DTYPE, TOKENS_DTYPE

_BUFFER_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A document, or as much of one as goes into one sequence. P tokens."""

    token_ids_P: NDArray[np.int32]
    loss_mask_P: NDArray[np.uint8]
    """1 where the token is a target; 0 for the first token."""
    num_bytes: int
    """UTF-8 bytes of the text that the targets spell."""

    def __len__(self) -> int:
        return len(self.token_ids_P)


class ShardWriter:
    """Writes the arrays of one split (and one side, for dpo) into ``directory``."""

    def __init__(
        self,
        directory: Path,
        split: str,
        *,
        sequence_tokens: int,
        pad_token_id: int,
        with_labels: bool,
        side: Side | None = None,
    ) -> None:
        self.num_sequences = 0
        self._sequence_tokens = sequence_tokens
        self._pad_token_id = pad_token_id
        self._labels: list[int] = []
        kinds = ["tokens", "segments", "loss", "bytes"] + (["labels"] if with_labels else [])
        self._arrays = {kind: _ArrayFile(directory, array_name(split, kind, side)) for kind in kinds}

    def append(self, pieces: Sequence[Piece], *, label: int | None = None) -> int:
        """Write one sequence of these pieces, in this order, then padding; returns its number.

        The pieces must fit; ``label`` is given exactly when the split has labels.
        """
        size = self._sequence_tokens
        assert sum(len(piece) for piece in pieces) <= size, "pieces are packed to fit a sequence; this is a bug"
        assert (label is not None) == ("labels" in self._arrays), "labels come with classify only; this is a bug"
        tokens_S = np.full(size, self._pad_token_id, dtype=TOKENS_DTYPE)
        segments_S = np.zeros(size, dtype=SEGMENTS_DTYPE)
        loss_S = np.zeros(size, dtype=LOSS_DTYPE)
        start = 0
        for number, piece in enumerate(pieces, start=1):
            stop = start + len(piece)
            tokens_S[start:stop] = piece.token_ids_P
            loss_S[start:stop] = piece.loss_mask_P
            segments_S[start:stop] = number
            start = stop
        self._arrays["tokens"].write(tokens_S.tobytes())
        self._arrays["segments"].write(segments_S.tobytes())
        self._arrays["loss"].write(loss_S.tobytes())
        num_bytes = sum(piece.num_bytes for piece in pieces)
        self._arrays["bytes"].write(np.array([num_bytes], dtype=BYTES_DTYPE).tobytes())
        if label is not None:
            self._labels.append(label)
        self.num_sequences += 1
        return self.num_sequences - 1

    def close(self, *, label_numbers: Sequence[int] | None = None) -> list[FileEntry]:
        """Bring everything to disk; the entries of the files.

        ``label_numbers[n]`` is the final number of the label that was appended as ``n``; None keeps the numbers.
        """
        if "labels" in self._arrays:
            numbers = self._labels if label_numbers is None else [label_numbers[label] for label in self._labels]
            self._arrays["labels"].write(np.array(numbers, dtype=LABELS_DTYPE).tobytes())
        return [array.close() for array in self._arrays.values()]

    def abandon(self) -> None:
        """Close the files without the wait for the disk."""
        for array in self._arrays.values():
            array.abandon()


class _ArrayFile:
    """One growing file, its size and its digest."""

    def __init__(self, directory: Path, name: str) -> None:
        self._name = name
        self._file = (directory / name).open("wb", buffering=_BUFFER_BYTES)
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def close(self) -> FileEntry:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(path=self._name, size=self._size, sha256=self._digest.hexdigest())

    def abandon(self) -> None:
        self._file.close()
