"""A question about a model in, numbers out: what both kinds of evaluation have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came of an evaluation."""

    metrics: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    """What a person should know to read them, one sentence each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What an evaluate job works with."""

    model: str
    """``name@version``."""
    question: str
    """What it is measured on, in words."""
    defining: Mapping[str, Any]
    """JSON values that, with the model, decide the numbers."""
    data: Path | None
    """Directory of the prepared data."""
    look: Callable[[], Mapping[str, str]]
    """Checks what else can be checked without measuring, and says what ``--dry-run`` shows besides the model."""
    measure: Callable[[Path], Measured]
    """Computes in the process that calls it; pickles. It is given the run directory, for a log."""
