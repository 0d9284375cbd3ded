"""What a directory of prepared data says about itself: ``manifest.json``, written last, is the commit."""

from pathlib import Path
from typing import Literal

import msgspec

from cluster.config.jobs_train import JobTask
from cluster.durable import write_json_durably
from cluster.errors import DataError
from cluster.registry.tree import file_sha256
from cluster.runs.files import MANIFEST

TOKENIZER_FOLDER = "tokenizer"

Split = Literal["train", "eval"]
Side = Literal["chosen", "rejected"]
SPLITS: tuple[Split, ...] = ("train", "eval")
SIDES: tuple[Side, ...] = ("chosen", "rejected")


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of the directory; ``path`` is relative, ``size`` in bytes."""

    path: str
    size: int
    sha256: str


class SourceEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One input, as it was found."""

    source: str
    """Canonical URI."""
    digest: str
    """Hex sha256 over the names and contents of the files that were read."""
    format: str
    weight: float
    num_files: int
    num_bytes: int
    num_rows: int = 0
    """Rows read, good and bad, before anything was left out."""


class TokenizerEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokenizer whose ids the shards hold; its files lie in ``tokenizer/``."""

    source: str
    digest: str
    """Hex sha256 over the names and contents of its files."""
    vocab_size: int
    """Token ids are below this number."""
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int
    """What padding holds: the tokenizer's own, else its end token, else 0."""
    context_tokens: int | None = None
    """Longest sequence that the model which brought the tokenizer was made for, where it says."""


class MixPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run of sequences from one input, and how many items of an epoch they make up."""

    source: int
    """Index into ``sources``."""
    first_sequence: int
    num_sequences: int
    num_items: int
    """``num_sequences`` times the input's weight, rounded."""


class SplitEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one split holds. A pair of dpo is one sequence here, its counts are those of both sides together."""

    num_documents: int
    num_sequences: int
    num_items: int
    """Items of one epoch: sequences, each as often as its input's weight says."""
    num_tokens: int
    """Real tokens, without padding."""
    num_targets: int
    num_text_bytes: int
    """UTF-8 bytes of the text that the targets spell."""
    num_truncated: int
    """Documents that were cut at ``sequence_tokens``."""
    fill_ratio: float
    """Real tokens over all positions; 1 minus the padding ratio."""
    label_counts: dict[str, int] = {}
    """Documents of each label."""
    parts: tuple[MixPart, ...]


class BadRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row that could not be used: ``place`` is ``file:line`` (or ``file:row``)."""

    place: str
    reason: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A committed directory of prepared data."""

    format: Literal[1] = 1
    name: str
    """Name of the job that made it."""
    task: JobTask
    digest: str
    """Hex sha256 over settings, tokenizer and the contents of all inputs; equal digests have equal bytes."""
    tokenizer: TokenizerEntry
    sequence_tokens: int
    labels: tuple[str, ...] | None = None
    """Label of each number in ``*-labels.bin``; None unless the task is classify."""
    num_rows: int
    """Rows read, good and bad."""
    num_bad_rows: int
    num_duplicates: int
    num_too_short: int
    num_without_targets: int
    """Documents in which nothing was left to learn from once they were cut at ``sequence_tokens``."""
    bad_rows_sample: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()
    """What a person should know, one sentence each."""
    splits: dict[str, SplitEntry]
    files: tuple[FileEntry, ...]
    sources: tuple[SourceEntry, ...]

    def split(self, name: str) -> SplitEntry:
        """The entry of a split; DataError naming those that exist when there is none."""
        if name not in self.splits:
            raise DataError(f"data {self.name}: no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]


def array_name(split: str, kind: str, side: str | None = None) -> str:
    """File name of one array: ``train-tokens.bin``, ``eval-chosen-loss.bin``."""
    return "-".join(part for part in (split, side, kind) if part is not None) + ".bin"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a committed directory; DataError when there is none, or not one this program can read."""
    path = directory / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError as error:
        raise DataError(f"{directory} holds no prepared data ({MANIFEST} is missing); prepare it again") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise DataError(
            f"{path} is not a manifest this Manta can read: {error}; remove it and prepare again"
        ) from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Commit ``directory``: the manifest appears whole, after everything else is on disk."""
    write_json_durably(directory / MANIFEST, manifest)


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Read every file of the manifest; DataError naming the first whose size or digest is not the recorded one."""
    for entry in manifest.files:
        check_size(directory, entry)
        actual = file_sha256(directory / entry.path)
        if actual != entry.sha256:
            raise DataError(
                f"{directory / entry.path} is damaged: sha256 {actual}, recorded {entry.sha256}; "
                "remove the directory and prepare the data again"
            )


def check_size(directory: Path, entry: FileEntry) -> None:
    """DataError when a file is missing or has another size than recorded."""
    path = directory / entry.path
    size = path.stat().st_size if path.is_file() else None
    if size != entry.size:
        found = "is missing" if size is None else f"has {size} bytes"
        raise DataError(
            f"{path} {found}, recorded with {entry.size}; remove the directory and prepare the data again"
        )
