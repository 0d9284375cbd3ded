"""A result as people and programs are shown it."""

from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One result, twice."""

    view: RenderableType
    """Fits 80 columns."""
    values: dict[str, Any]
    """JSON values."""
