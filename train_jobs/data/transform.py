"""A chunk enters, its documents as tokens leave, with a count of what was left out: read, clean, tokenize.

This is the work that is spread over processes. It depends on the chunk alone, and everything about the order of
documents is decided later, so the result is the same wherever it runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import msgspec
import numpy as np

from cluster.config.jobs_train import JobTask
from cluster.runs.prepared import BadRow
from train_jobs.data.chunking import Chunk
from train_jobs.data.cleaning import Example, Malformed, make_example
from train_jobs.data.reading import Record, read_chunk
from train_jobs.data.shard_writer import Piece
from train_jobs.data.shards import LOSS_DTYPE, TOKENS_DTYPE
from train_jobs.data.spec import CleanSpec
from train_jobs.data.splitting import content_hash
from train_jobs.data.tokenizer import TokenizerText
from train_jobs.data.tokenizing import Tokenized, tokenize

BATCH_ROWS = 512
"""Rows that are tokenized, and handed on, at a time."""
_SAMPLE_BAD_ROWS = 10


class RawPiece(msgspec.Struct, frozen=True, array_like=True):
    """A :class:`Piece` as bytes, little-endian."""

    token_ids: bytes
    loss_mask: bytes
    num_bytes: int

    def piece(self) -> Piece:
        """Its arrays."""
        return Piece(
            token_ids_P=np.frombuffer(self.token_ids, dtype=TOKENS_DTYPE),
            loss_mask_P=np.frombuffer(self.loss_mask, dtype=LOSS_DTYPE),
            num_bytes=self.num_bytes,
        )


class Document(msgspec.Struct, frozen=True, array_like=True):
    """A document that is ready to be packed."""

    content: bytes
    """Hash of what makes it the same as another one."""
    split_key: bytes
    """Hash of what decides its split."""
    label: str | None
    truncated: bool
    pieces: tuple[RawPiece, ...]


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """What became of some rows of one chunk."""

    source: int
    num_rows: int
    num_bad_rows: int
    bad_rows: tuple[BadRow, ...]
    """The first few."""
    num_too_short: int
    documents: tuple[Document, ...]
    """In the order of their rows; those without pieces have nothing to learn from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """Settings of the work; pickles."""

    task: JobTask
    clean: CleanSpec
    labels: frozenset[str] | None
    tokenizer: TokenizerText
    sequence_tokens: int

    def __call__(self, chunk: Chunk) -> Iterator[Batch]:
        """The chunk's batches, in order; DataError for a file that cannot be read."""
        rows = read_chunk(chunk)
        while taken := list(islice(rows, BATCH_ROWS)):
            yield self._batch(chunk.source, taken)

    def _batch(self, source: int, rows: list[Record | BadRow]) -> Batch:
        cleaned = [self._clean(row) for row in rows]
        kept = [item for item in cleaned if isinstance(item, tuple) and item[1].num_chars >= self.clean.min_chars]
        num_clean = sum(1 for item in cleaned if isinstance(item, tuple))
        examples = [example for _, example in kept]
        results = tokenize(self.task, examples, self.tokenizer, self.sequence_tokens) if examples else []
        bad = [item for item in cleaned if isinstance(item, BadRow)]
        documents = []
        for (place, example), result in zip(kept, results, strict=True):
            if isinstance(result, Malformed):
                bad.append(BadRow(place=place, reason=str(result)))
            else:
                documents.append(_document(example, result))
        return Batch(
            source=source,
            num_rows=len(rows),
            num_bad_rows=len(bad),
            bad_rows=tuple(bad[:_SAMPLE_BAD_ROWS]),
            num_too_short=num_clean - len(kept),
            documents=tuple(documents),
        )

    def _clean(self, row: Record | BadRow) -> tuple[str, Example] | BadRow:
        if isinstance(row, BadRow):
            return row
        try:
            return row.place, make_example(self.task, row.values, self.clean, self.labels)
        except Malformed as error:
            return BadRow(place=row.place, reason=str(error))


def _document(example: Example, tokenized: Tokenized) -> Document:
    raw = tuple(
        RawPiece(
            piece.token_ids_P.astype(TOKENS_DTYPE).tobytes(),
            piece.loss_mask_P.astype(LOSS_DTYPE).tobytes(),
            piece.num_bytes,
        )
        for piece in tokenized.pieces
    )
    return Document(
        content_hash(*example.identity),
        content_hash(*example.split_identity),
        example.label,
        tokenized.truncated,
        raw,
    )
