"""Documents of one split enter in order, its arrays on disk and what they hold leave."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.runs.prepared import SIDES, FileEntry, MixPart, Side, Split, SplitEntry
from train_jobs.data.packing import Packer
from train_jobs.data.shard_writer import Piece, ShardWriter
from train_jobs.data.spec import PrepareSpec
from train_jobs.data.transform import Document


@dataclass(slots=True)
class _Counts:
    """Running totals of one split."""

    documents: int = 0
    tokens: int = 0
    targets: int = 0
    text_bytes: int = 0
    truncated: int = 0
    labels: Counter[str] = field(default_factory=Counter)

    def add(self, document: Document, pieces: Sequence[Piece]) -> None:
        self.documents += 1
        self.truncated += document.truncated
        if document.label is not None:
            self.labels[document.label] += 1
        for piece in pieces:
            self.tokens += len(piece)
            self.targets += int(piece.loss_mask_P.sum())
            self.text_bytes += piece.num_bytes


class SplitCollector:
    """Packs and writes the documents of one split. Sequences never mix inputs, so that each input can be weighed."""

    def __init__(self, directory: Path, split: Split, spec: PrepareSpec, *, pad_token_id: int) -> None:
        self._split = split
        self._spec = spec
        self._counts = _Counts()
        self._label_numbers: dict[str, int] = {}
        self._parts: list[MixPart] = []
        self._source = 0
        self._packer = Packer(spec.sequence_tokens) if spec.task in ("lm", "sft") else None
        sides: Sequence[Side | None] = SIDES if spec.task == "dpo" else (None,)
        self._writers = [
            ShardWriter(
                directory,
                split,
                sequence_tokens=spec.sequence_tokens,
                pad_token_id=pad_token_id,
                with_labels=spec.task == "classify",
                side=side,
            )
            for side in sides
        ]

    @property
    def label_counts(self) -> Counter[str]:
        """Documents of each label so far."""
        return self._counts.labels

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return self._counts.documents

    def add(self, document: Document, source: int) -> None:
        """Take the next document, which has something to learn from; ``source`` never goes down."""
        if source != self._source:
            self._end_source(source)
        pieces = [raw.piece() for raw in document.pieces]
        self._counts.add(document, pieces)
        if self._packer is None:
            self._write_alone(document, pieces)
            return
        for piece in pieces:
            for packed in self._packer.add(piece):
                self._writers[0].append(packed)

    def close(self, labels: Sequence[str] | None) -> tuple[SplitEntry, list[FileEntry]]:
        """Write what is left; what the split holds, and its files. ``labels`` decide the labels' numbers."""
        self._end_source(self._source)
        numbers = None if labels is None else [labels.index(label) for label in self._label_numbers]
        files = [entry for writer in self._writers for entry in writer.close(label_numbers=numbers)]
        counts, num_sequences = self._counts, self._writers[0].num_sequences
        positions = len(self._writers) * num_sequences * self._spec.sequence_tokens
        entry = SplitEntry(
            num_documents=counts.documents,
            num_sequences=num_sequences,
            num_items=sum(part.num_items for part in self._parts),
            num_tokens=counts.tokens,
            num_targets=counts.targets,
            num_text_bytes=counts.text_bytes,
            num_truncated=counts.truncated,
            fill_ratio=round(counts.tokens / positions, 6) if positions else 0.0,
            label_counts=dict(sorted(counts.labels.items())),
            parts=tuple(self._parts),
        )
        return entry, files

    def abandon(self) -> None:
        """Close the files; nothing of the split is kept."""
        for writer in self._writers:
            writer.abandon()

    def _write_alone(self, document: Document, pieces: Sequence[Piece]) -> None:
        number = None
        if document.label is not None:
            number = self._label_numbers.setdefault(document.label, len(self._label_numbers))
        for writer, piece in zip(self._writers, pieces, strict=True):
            writer.append([piece], label=number)

    def _end_source(self, next_source: int) -> None:
        if self._packer is not None:
            for packed in self._packer.flush():
                self._writers[0].append(packed)
        first = self._parts[-1].first_sequence + self._parts[-1].num_sequences if self._parts else 0
        count = self._writers[0].num_sequences - first
        if count:
            weight = self._spec.inputs[self._source].weight if self._split == "train" else 1.0
            items = max(1, round(count * weight))
            self._parts.append(
                MixPart(source=self._source, first_sequence=first, num_sequences=count, num_items=items)
            )
        self._source = next_source
