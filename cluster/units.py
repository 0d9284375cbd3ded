"""Human units to numbers and back: ``8GiB`` -> bytes, ``30s`` -> seconds."""

import re
from collections.abc import Mapping
from decimal import Decimal

_BYTES: dict[str, int] = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SECONDS: dict[str, int | Decimal] = {"ms": Decimal("0.001"), "s": 1, "m": 60, "h": 3600, "d": 86400}
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")
_TOO_LARGE = 2**63


def _parse(text: str, units: Mapping[str, int | Decimal], example: str) -> Decimal:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None or match[2] not in units:
        raise ValueError(f"{text!r} is not a number with a unit; write {example} ({', '.join(units)})")
    number = Decimal(match[1]) * units[match[2]]
    if number >= _TOO_LARGE:
        raise ValueError(f"{text[:20]}... is too large")
    return number


def parse_bytes(text: str) -> int:
    """Bytes in ``text``, e.g. ``8GiB`` or ``500MB``; ValueError for anything else."""
    return round(_parse(text, _BYTES, "8GiB or 500MB"))


def parse_seconds(text: str) -> float:
    """Seconds in ``text``, e.g. ``30s``, ``1.5h`` or ``200ms``; ValueError for anything else."""
    return float(_parse(text, _SECONDS, "30s or 200ms"))


def format_bytes(num_bytes: float) -> str:
    """``num_bytes`` with a binary unit and at most one decimal, e.g. ``1.5GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f}{unit}" if unit == "B" else f"{num_bytes:.1f}{unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f}GiB"


def exact_bytes(num_bytes: int) -> str:
    """``num_bytes`` in the largest binary unit that divides it, so that ``parse_bytes`` gives it back exactly."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes and num_bytes % _BYTES[unit] == 0:
            return f"{num_bytes // _BYTES[unit]}{unit}"
    return f"{num_bytes}B"


def exact_seconds(seconds: float) -> str:
    """``seconds`` with its unit, so that ``parse_seconds`` gives it back exactly, e.g. ``600s`` or ``0.25s``."""
    return f"{Decimal(repr(float(seconds))):f}s".replace(".0s", "s")


def format_duration(seconds: float) -> str:
    """``seconds`` for people, in its two largest units: ``45s``, ``3m 20s``, ``5h 07m``, ``2d 03h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"
