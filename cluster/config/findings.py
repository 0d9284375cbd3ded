"""A ``Finding`` is one mistake in the config's tree; with the places of the text it becomes a Problem."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.errors import Problem

Location = tuple[str | int, ...]
"""Keys and list indices from the root, such as ``("models", 0, "source")``."""

WHOLE_FILE = "(whole file)"
_SHOWN_CHARACTERS = 70


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an entry begins in the text (both 1-based), and its value as written."""

    line: int
    column: int
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One mistake: where, what is wrong, what is allowed, what to do."""

    at: Location
    message: str
    remedy: str
    limit: str | None = None
    value: str | None = None
    """What was written; when absent, the text at ``at`` is shown."""
    place: Place | None = None
    """Where it is, when it is not where ``at`` says (a key that is written twice)."""


def dotted(at: Location) -> str:
    """``at`` as people write it: ``models[0].pipeline.stages``."""
    text = ""
    for part in at:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isprintable() and part.strip() and not set(part) & set(" .[]"):
            text += f".{shorten(part)}"
        else:
            text += f"[{shorten(json.dumps(part))}]"
    return text.removeprefix(".") or WHOLE_FILE


def shorten(text: str) -> str:
    """``text`` cut to what fits a message, with control characters escaped."""
    plain = text if text.isprintable() else json.dumps(text)
    return plain if len(plain) <= _SHOWN_CHARACTERS else plain[: _SHOWN_CHARACTERS - 3] + "..."


def locate(at: Location, places: Mapping[Location, Place]) -> Place:
    """The place of ``at``, or of the nearest entry around it."""
    for length in range(len(at), -1, -1):
        place = places.get(at[:length])
        if place is not None:
            return place
    return Place(line=1, column=1)


def to_problems(file: str, findings: Iterable[Finding], places: Mapping[Location, Place]) -> tuple[Problem, ...]:
    """``findings`` as Problems of ``file``, in file order, each once."""
    placed = [(finding.place or locate(finding.at, places), finding) for finding in findings]
    placed.sort(key=lambda pair: (pair[0].line, pair[0].column))
    problems = [_to_problem(file, place, finding, places) for place, finding in placed]
    return tuple(dict.fromkeys(problems))


def _to_problem(file: str, place: Place, finding: Finding, places: Mapping[Location, Place]) -> Problem:
    written = places.get(finding.at)
    return Problem(
        file=file,
        line=place.line,
        path=dotted(finding.at),
        message=finding.message,
        value=finding.value or (written.text if written else None),
        limit=finding.limit,
        remedy=finding.remedy,
    )
