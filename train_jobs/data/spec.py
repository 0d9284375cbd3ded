"""What a preparation job is asked to do: the resolved values of its YAML section, with no defaults of their own.

``msgspec.convert(mapping, PrepareSpec)`` makes one from what the plan carries.
"""

from dataclasses import dataclass
from typing import Literal

from cluster.config.jobs import Format
from cluster.config.jobs_train import JobTask

TASK_FIELDS: dict[JobTask, tuple[str, ...]] = {
    "lm": ("text",),
    "classify": ("text", "label"),
    "sft": ("messages",),
    "dpo": ("prompt", "chosen", "rejected"),
}
"""Fields of :class:`Fields` that a row of each task needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Names of the columns (jsonl, csv, parquet) that hold each field."""

    text: str
    label: str
    messages: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One input."""

    source: str
    """URI: ``wheel://``, ``npm://``, ``hf://`` or ``path://``."""
    sha256: str | None = None
    """Of the downloaded archive, the single file, or the directory's files; other bytes are refused."""
    format: Format
    """``folders``: a file is a document, its top folder the label. ``text``: a file is a document. ``lines``: a line
    is. ``dialogs``: YAML or JSON with ``conversations``, lists of turns, the user's first."""
    files: str | None = None
    """Glob, relative to the source, of the files to read; None takes those whose suffix goes with the format."""
    fields: Fields
    encoding: str
    """Of the text; a byte order mark in a file overrules ``utf-8``."""
    weight: float
    """How often each of its sequences comes up in one epoch of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanSpec:
    """What is done to each document's text, besides unified line ends and no white space at its ends."""

    min_chars: int
    """Shorter documents are left out, and counted."""
    deduplicate: bool
    """Whether a document that was there before is left out, and counted."""
    normalize: Literal["NFC", "NFKC"] | None
    """Unicode normalization form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSpec:
    """Which documents are held out for evaluation."""

    eval_fraction: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSpec:
    """A preparation job."""

    name: str
    task: JobTask
    inputs: tuple[InputSpec, ...]
    tokenizer: str
    """URI of a model; its tokenizer is used."""
    sequence_tokens: int
    clean: CleanSpec
    split: SplitSpec
    labels: tuple[str, ...] | None = None
    """All labels there may be, in the order of their numbers; None takes those that are found, sorted."""
    max_bad_rows: int
    """Malformed rows tolerated; more are an error."""
