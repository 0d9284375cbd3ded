"""Screening: which files of a source directory become part of a version, and which sources are refused.

Only safetensors weights and plain-text descriptions are taken. Pickles can run code when they are read, so they are
never copied, and a source that has nothing else is refused by the file's name. Python files are never copied either.
"""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from cluster.errors import SourceError

TAKEN_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")
TAKEN_NAMES = ("LICENSE", "NOTICE")
TAKEN_PATTERNS = tuple(f"*{suffix}" for suffix in TAKEN_SUFFIXES) + tuple(f"{name}*" for name in TAKEN_NAMES)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".hdf5", ".msgpack", ".joblib", ".npz")
INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """A source directory after screening."""

    directory: Path
    taken: tuple[str, ...]
    """Paths to publish, relative, sorted."""
    left_out: tuple[str, ...]
    """Paths that stay behind: pickles, Python, other formats."""
    config: dict[str, Any]
    """Content of ``config.json``."""
    dtypes: frozenset[str]
    """Floating-point dtypes in the weights, in safetensors' spelling (``F32``, ``BF16``)."""


def screen(directory: Path) -> Screened:
    """What of ``directory`` may be published; SourceError naming the file when that is nothing usable."""
    paths = _walk(directory)
    weights = _wanted_weights(directory, [path for path in paths if path.endswith(".safetensors")])
    if not weights:
        raise SourceError(_no_safetensors(directory, paths))
    if "config.json" not in paths:
        raise SourceError(
            f"{directory} has no config.json; give a directory as transformers' save_pretrained writes it"
        )
    taken = sorted(
        path for path in paths if path in weights or (_is_text(path) and not path.endswith(".safetensors"))
    )
    headers = (read_header_file(directory / path) for path in weights)
    dtypes = {str(tensor["dtype"]) for header in headers for tensor in header.values()}
    return Screened(
        directory=directory,
        taken=tuple(taken),
        left_out=tuple(path for path in paths if path not in taken),
        config=_read_config(directory / "config.json"),
        dtypes=frozenset(dtype for dtype in dtypes if dtype.startswith(("F", "BF"))),
    )


def refuse_pickle(file: Path) -> None:
    """SourceError when ``file`` is of a kind that is, or may hold, a pickle."""
    if file.suffix.lower() in PICKLE_SUFFIXES:
        raise SourceError(
            f"{file}: pickle files ({file.suffix}) can run code when they are read and are refused; convert it to "
            "safetensors where you trust it (save_pretrained does), then import the directory"
        )


def read_header_file(path: Path) -> dict[str, dict[str, Any]]:
    """``read_header`` of a local file; SourceError naming it when it is not safetensors."""
    with path.open("rb") as file:
        try:
            return read_header(file)
        except ValueError as error:
            raise SourceError(f"{path}: not a safetensors file: {error}") from error


def read_header(file: BinaryIO) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file; ValueError when it is none."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError(f"{len(prefix)} bytes are too short for a header")
    (num_bytes,) = struct.unpack("<Q", prefix)
    if num_bytes > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {num_bytes} bytes is over the limit of {_MAX_HEADER_BYTES}")
    header = json.loads(file.read(num_bytes))
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _walk(directory: Path) -> list[str]:
    paths = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [
            (Path(folder) / name).relative_to(directory).as_posix() for name in names if not name.startswith(".")
        ]
    return sorted(paths)


def _is_text(path: str) -> bool:
    name = PurePosixPath(path).name
    return name.endswith(TAKEN_SUFFIXES) or name.startswith(TAKEN_NAMES)


def _wanted_weights(directory: Path, weights: list[str]) -> set[str]:
    """The weights transformers would load, and those of sub-folders; not a second copy beside them."""
    nested = {path for path in weights if "/" in path}
    top = {path for path in weights if "/" not in path}
    if (directory / INDEX_NAME).is_file():
        shards = set(json.loads((directory / INDEX_NAME).read_text())["weight_map"].values())
        if missing := sorted(shards - top):
            raise SourceError(f"{directory / INDEX_NAME} lists {', '.join(missing)}, but the directory lacks them")
        return shards | nested
    return ({"model.safetensors"} if "model.safetensors" in top else top) | (nested if top else set())


def _no_safetensors(directory: Path, paths: list[str]) -> str:
    pickles = [path for path in paths if path.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"{directory} has its weights only in pickle files ({', '.join(pickles)}), which can run code when "
            "they are read and are refused; convert them to safetensors where you trust them (save_pretrained does)"
        )
    return f"{directory} has no .safetensors file; it has {', '.join(paths[:20]) or 'nothing'}"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise SourceError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict) or not config.get("architectures") or not config.get("model_type"):
        raise SourceError(
            f"{path}: needs 'model_type' and 'architectures' (the transformers class that wrote the weights)"
        )
    return config
