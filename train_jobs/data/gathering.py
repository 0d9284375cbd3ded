"""Batches of documents enter in order, the arrays of both splits leave: duplicates out, split, packed, counted.

Everything that depends on more than one document happens here, in one process. Its memory is 16 bytes a document, for
finding duplicates, and the sequences that are being filled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import DataError
from cluster.registry.progress import Progress
from cluster.runs.prepared import SPLITS, BadRow, FileEntry, Split, SplitEntry
from train_jobs.data.collecting import SplitCollector
from train_jobs.data.spec import PrepareSpec
from train_jobs.data.splitting import split_of
from train_jobs.data.transform import Batch, Document

_SAMPLE_BAD_ROWS = 10
_LABEL = "preparing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What has been written, and what has been left out."""

    splits: dict[Split, SplitEntry]
    files: list[FileEntry]
    labels: tuple[str, ...] | None
    notes: tuple[str, ...]
    num_rows: int
    rows_of_source: list[int]
    num_bad_rows: int
    bad_rows: tuple[BadRow, ...]
    num_duplicates: int
    num_too_short: int
    num_without_targets: int


def gather(
    spec: PrepareSpec, batches: Iterator[Batch], directory: Path, pad_token_id: int, progress: Progress
) -> Gathered:
    """Write the documents of all batches; DataError when too many rows are malformed, or too little is left."""
    gatherer = _Gatherer(spec, directory, pad_token_id)
    try:
        progress(_LABEL, 0, None, "rows")
        for batch in batches:
            gatherer.add(batch)
            progress(_LABEL, gatherer.num_rows, None, "rows")
        gathered = gatherer.finish()
    except BaseException:
        gatherer.abandon()
        raise
    progress(_LABEL, gathered.num_rows, gathered.num_rows, "rows")
    return gathered


class _Gatherer:
    def __init__(self, spec: PrepareSpec, directory: Path, pad_token_id: int) -> None:
        self._spec = spec
        self._collectors = {
            split: SplitCollector(directory, split, spec, pad_token_id=pad_token_id) for split in SPLITS
        }
        self._seen: dict[bytes, str | None] = {}
        """Label of each document so far, by its hash."""
        self._rows_of_source = [0] * len(spec.inputs)
        self._bad_rows: list[BadRow] = []
        self._num_bad_rows = self._num_too_short = self._num_duplicates = 0
        self._num_without_targets = self._num_conflicting = 0

    @property
    def num_rows(self) -> int:
        """Rows so far, good and bad."""
        return sum(self._rows_of_source)

    def add(self, batch: Batch) -> None:
        self._rows_of_source[batch.source] += batch.num_rows
        self._num_too_short += batch.num_too_short
        self._add_bad_rows(batch)
        for document in batch.documents:
            if self._spec.clean.deduplicate and self._is_duplicate(document):
                self._num_duplicates += 1
            elif not document.pieces:
                self._num_without_targets += 1
            else:
                split = split_of(document.split_key, self._spec.split)
                self._collectors[split].add(document, batch.source)

    def abandon(self) -> None:
        for collector in self._collectors.values():
            collector.abandon()

    def finish(self) -> Gathered:
        self._check_counts()
        labels = self._check_labels() if self._spec.task == "classify" else None
        entries, files = {}, []
        for split, collector in self._collectors.items():
            entries[split], written = collector.close(labels)
            files += written
        return Gathered(
            splits=entries,
            files=files,
            labels=labels,
            notes=tuple(self._notes(labels)),
            num_rows=self.num_rows,
            rows_of_source=self._rows_of_source,
            num_bad_rows=self._num_bad_rows,
            bad_rows=tuple(self._bad_rows),
            num_duplicates=self._num_duplicates,
            num_too_short=self._num_too_short,
            num_without_targets=self._num_without_targets,
        )

    def _is_duplicate(self, document: Document) -> bool:
        if document.content not in self._seen:
            self._seen[document.content] = document.label
            return False
        self._num_conflicting += self._seen[document.content] != document.label
        return True

    def _add_bad_rows(self, batch: Batch) -> None:
        self._num_bad_rows += batch.num_bad_rows
        self._bad_rows += batch.bad_rows[: _SAMPLE_BAD_ROWS - len(self._bad_rows)]
        if self._num_bad_rows > self._spec.max_bad_rows:
            first = "\n".join(f"  {row.place}: {row.reason}" for row in self._bad_rows)
            raise DataError(
                f"{self._spec.name}: {self._num_bad_rows} of the first {self.num_rows} rows are malformed, and "
                f"max_bad_rows is {self._spec.max_bad_rows}; repair or remove them, or raise the limit:\n{first}"
            )

    def _check_counts(self) -> None:
        counts = {split: collector.num_documents for split, collector in self._collectors.items()}
        left_out = (
            f"{self.num_rows} rows read, {self._num_bad_rows} malformed, {self._num_too_short} too short, "
            f"{self._num_duplicates} duplicates, {self._num_without_targets} without anything to learn from"
        )
        if counts["train"] == 0:
            raise DataError(f"{self._spec.name}: no document is left to train on ({left_out})")
        if counts["eval"] == 0 and self._spec.split.eval_fraction > 0:
            raise DataError(
                f"{self._spec.name}: none of {counts['train']} documents is held out for evaluation at eval_fraction "
                f"{self._spec.split.eval_fraction}; raise it, or set it to 0 ({left_out})"
            )

    def _check_labels(self) -> tuple[str, ...]:
        """All labels, in the order of their numbers."""
        name, wanted = self._spec.name, self._spec.labels
        train, held_out = (self._collectors[split].label_counts for split in SPLITS)
        unknown = sorted(held_out.keys() - train.keys())
        if unknown:
            raise DataError(
                f"{name}: label {', '.join(map(repr, unknown))} has documents only in the evaluation split; add "
                "documents, or lower eval_fraction"
            )
        if len(train) < 2:
            raise DataError(f"{name}: classify needs two labels or more, and there is only {next(iter(train))!r}")
        return tuple(sorted(train)) if wanted is None else wanted

    def _notes(self, labels: Sequence[str] | None) -> Iterator[str]:
        train, held_out = (self._collectors[split].label_counts for split in SPLITS)
        if self._spec.split.eval_fraction > 0:
            for label in sorted(train.keys() - held_out.keys()):
                yield f"no document of label {label!r} is held out for evaluation"
        for label in sorted(set(labels or ()) - train.keys()):
            yield f"no document has label {label!r}"
        if self._num_conflicting:
            yield f"{self._num_conflicting} duplicates have another label than the first of their kind, which is kept"
