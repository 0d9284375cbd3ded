"""Files that survive a power cut: bytes in, a file that is wholly there or not at all out."""

import os
from pathlib import Path
from typing import Any

import msgspec


def write_durably(path: Path, content: bytes) -> None:
    """Replace ``path`` in one step by a file that is wholly on disk; its folder's entry is not, see sync_folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json_durably(path: Path, value: Any) -> None:
    """The same with what msgspec can encode, indented for people."""
    write_durably(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
