"""Small prepared data for tests of training: a committed directory with the sequences that the test gives."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cluster.config.jobs_train import JobTask
from cluster.runs.prepared import (
    SIDES,
    Manifest,
    MixPart,
    Side,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
    write_manifest,
)
from train_jobs.data.shard_writer import Piece, ShardWriter

Documents = Sequence[Sequence[int]]
"""The documents of one sequence, each a list of token ids."""


def piece(token_ids: Sequence[int]) -> Piece:
    """A document in which every token but the first is a target, with two bytes of text for each target."""
    mask = np.ones(len(token_ids), dtype=np.uint8)
    mask[0] = 0
    return Piece(token_ids_P=np.array(token_ids, np.int32), loss_mask_P=mask, num_bytes=2 * (len(token_ids) - 1))


def write_data(
    directory: Path,
    splits: Mapping[str, Sequence[Documents]],
    *,
    sequence_tokens: int,
    vocab_size: int,
    task: JobTask = "lm",
    labels: Mapping[str, Sequence[int]] | None = None,
    rejected: Mapping[str, Sequence[Documents]] | None = None,
    weights: Sequence[tuple[int, float]] = (),
) -> Path:
    """Write ``splits`` (split -> sequences -> documents) to ``directory`` and commit it.

    ``labels`` go with classify, ``rejected`` with dpo (``splits`` are the chosen ones then). ``weights`` are (number
    of sequences, weight) of each input, for the split train.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files, entries = [], {}
    for split, sequences in splits.items():
        sides: Sequence[Side | None] = SIDES if task == "dpo" else (None,)
        for side in sides:
            writer = ShardWriter(
                directory,
                split,
                sequence_tokens=sequence_tokens,
                pad_token_id=0,
                with_labels=labels is not None,
                side=side,
            )
            held = rejected[split] if rejected is not None and side == "rejected" else sequences
            for number, documents in enumerate(held):
                label = labels[split][number] if labels is not None else None
                writer.append([piece(document) for document in documents], label=label)
            files += writer.close()
        entries[split] = _entry(sequences, sequence_tokens, weights if split == "train" else ())
    names = tuple(f"label{n}" for n in range(1 + max(max(n, default=0) for n in labels.values()))) if labels else None
    manifest = Manifest(
        name="tiny",
        task=task,
        digest="0" * 64,
        tokenizer=TokenizerEntry(source="path:///tiny", digest="0" * 64, vocab_size=vocab_size, pad_token_id=0),
        sequence_tokens=sequence_tokens,
        labels=names,
        num_rows=0,
        num_bad_rows=0,
        num_duplicates=0,
        num_too_short=0,
        num_without_targets=0,
        splits=entries,
        files=tuple(files),
        sources=(
            SourceEntry(source="path:///tiny", digest="0" * 64, format="lines", weight=1.0, num_files=1, num_bytes=0),
        ),
    )
    write_manifest(directory, manifest)
    return directory


def _entry(sequences: Sequence[Documents], sequence_tokens: int, weights: Sequence[tuple[int, float]]) -> SplitEntry:
    parts, first = [], 0
    for source, (count, weight) in enumerate(weights or [(len(sequences), 1.0)]):
        items = round(count * weight)
        parts.append(MixPart(source=source, first_sequence=first, num_sequences=count, num_items=items))
        first += count
    num_documents = sum(len(documents) for documents in sequences)
    num_tokens = sum(len(document) for documents in sequences for document in documents)
    return SplitEntry(
        num_documents=num_documents,
        num_sequences=len(sequences),
        num_items=sum(part.num_items for part in parts),
        num_tokens=num_tokens,
        num_targets=num_tokens - num_documents,
        num_text_bytes=2 * (num_tokens - num_documents),
        num_truncated=0,
        fill_ratio=num_tokens / max(1, len(sequences) * sequence_tokens),
        parts=tuple(parts),
    )
