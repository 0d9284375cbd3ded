"""Materializing: a version becomes a local directory with its files, every one verified against the manifest.

A local registry's blobs are hard-linked, so a version costs no second copy, and whoever has its files open can read
on when GC removes it; a remote one's are downloaded once into the cache. The directory appears whole, by a rename,
and any number of processes may ask for it at once. Each process verifies each version once.

An adapter's directory is that of its base, with the adapter in the folder ``adapter/``, and with the adapter's own
tokenizer and templates where it has any.
"""

import os
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import RegistryError
from cluster.registry.adapter import CONFIG_NAME, FOLDER, WEIGHTS_NAME
from cluster.registry.manifest import FileEntry, ModelVersion
from cluster.registry.progress import ByteCount, Progress, no_progress
from cluster.registry.store import Registry, blob_path
from cluster.registry.tree import TEMPORARY_PREFIX, LocalTree, file_sha256, remove_folder

_verified: set[Path] = set()
"""Directories that this process has verified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """One file of a materialized directory: where it lies there, and which version it is of."""

    path: str
    entry: FileEntry
    version: ModelVersion


def materialize(registry: Registry, version: ModelVersion, *, progress: Progress = no_progress) -> Path:
    """A local directory with the files of ``version``, verified; read it, never write it.

    A directory that was damaged since is made anew. RegistryError naming file and digests when the registry's own
    bytes are wrong.
    """
    directory = registry.cache / "models" / version.name / f"{version.version}-{version.content_digest[:16]}"
    if directory in _verified and directory.is_dir():
        return directory
    layout = _lay_out(registry, version)
    if directory.is_dir() and _damaged(layout, directory, progress) is not None:
        _set_aside(directory)
    if not directory.is_dir():
        _build(registry, layout, directory, progress)
    _verified.add(directory)
    return directory


def _lay_out(registry: Registry, version: ModelVersion) -> tuple[_Placed, ...]:
    own = {entry.path: _Placed(path=entry.path, entry=entry, version=version) for entry in version.files}
    if version.adapter_of is None:
        return tuple(own.values())
    base = registry.resolve(version.adapter_of)
    apart = tuple(
        _Placed(path=f"{FOLDER}/{name}", entry=own[name].entry, version=version)
        for name in (CONFIG_NAME, WEIGHTS_NAME)
    )
    whole = {entry.path: _Placed(path=entry.path, entry=entry, version=base) for entry in base.files}
    texts = {path: placed for path, placed in own.items() if _is_text_of_adapter(path)}
    return (*(whole | texts).values(), *apart)


def _is_text_of_adapter(path: str) -> bool:
    """Tokenizer, templates, settings of generation; what describes the weights is the base's, as they are."""
    return not path.endswith(".safetensors") and path not in (CONFIG_NAME, "config.json")


def _set_aside(directory: Path) -> None:
    """Remove a directory so that others see it whole or not at all."""
    grave = _temporary(directory.parent)
    with suppress(OSError):  # another process was first
        os.rename(directory, grave)
    remove_folder(grave)


def verify(
    registry: Registry, version: ModelVersion, *, remove_damaged: bool = False, progress: Progress = no_progress
) -> list[str]:
    """What is wrong with the blobs of ``version``, one line each; empty when all is well.

    ``remove_damaged`` also deletes the blobs that are wrong, so that the next import of the same bytes writes them
    anew.
    """
    count = ByteCount(progress, f"verifying {version.reference}", version.total_bytes)
    problems = []
    for entry in version.files:
        problem = _check_blob(registry, version, entry, count)
        if problem is not None:
            problems.append(problem)
            if remove_damaged:
                registry.tree.remove(blob_path(entry.sha256))
    return problems


def sweep_cache(registry: Registry, *, grace_s: float) -> None:
    """Delete what this machine's cache holds of versions that are gone, and what killed processes left half-made."""
    for directory in (registry.cache / "models").glob("*/*"):
        if directory.name.startswith(TEMPORARY_PREFIX):
            gone = time.time() - directory.stat().st_mtime >= grace_s
        else:
            gone = registry.deleted(directory.parent.name, directory.name.partition("-")[0])
        if gone:
            remove_folder(directory)


def _check_blob(registry: Registry, version: ModelVersion, entry: FileEntry, count: ByteCount) -> str | None:
    tree, path = registry.tree, blob_path(entry.sha256)
    size = tree.size(path)
    if size != entry.size:
        found = "is missing" if size is None else f"has {size} bytes"
        expected = f"published with {entry.size} bytes; import it again"
        return f"{version.reference}: the blob of {entry.path} {found}, {expected}"
    if isinstance(tree, LocalTree):
        actual = file_sha256(tree.local_path(path), count.add)
    else:
        target = _temporary(registry.cache / "verify")
        try:
            tree.get(path, target, count.add)
            actual = file_sha256(target)
        finally:
            target.unlink(missing_ok=True)
    return None if actual == entry.sha256 else _damage_text(version, entry, actual)


def _build(registry: Registry, layout: Sequence[_Placed], directory: Path, progress: Progress) -> None:
    temporary = _temporary(directory.parent)
    count = ByteCount(progress, f"fetching {_reference(layout)}", _num_bytes(layout))
    try:
        for placed in layout:
            target = temporary / placed.path
            target.parent.mkdir(parents=True, exist_ok=True)
            _place(registry, placed.version, placed.entry, target, count)
        damaged = _damaged(layout, temporary, progress)
        if damaged is not None:
            raise RegistryError(damaged)
        with suppress(OSError):  # another process was first: its directory is as good
            os.rename(temporary, directory)
    finally:
        remove_folder(temporary)
    if not directory.is_dir():
        raise RegistryError(f"{directory} could not be made; check that {registry.cache} is writable and has space")


def _place(registry: Registry, version: ModelVersion, entry: FileEntry, target: Path, count: ByteCount) -> None:
    path = blob_path(entry.sha256)
    try:
        if not isinstance(registry.tree, LocalTree):
            registry.tree.get(path, target, count.add)
            return
        try:
            os.link(registry.tree.local_path(path), target)
        except FileNotFoundError:
            raise
        except OSError:  # the cache is on another file system, or links are not allowed here
            shutil.copyfile(registry.tree.local_path(path), target)
        count.add(entry.size)
    except FileNotFoundError as error:
        raise RegistryError(f"{version.reference}: the blob of {entry.path} is missing; import it again") from error


def _damaged(layout: Sequence[_Placed], directory: Path, progress: Progress) -> str | None:
    count = ByteCount(progress, f"verifying {_reference(layout)}", _num_bytes(layout))
    for placed in layout:
        try:
            actual = file_sha256(directory / placed.path, count.add)
        except FileNotFoundError:
            return f"{placed.version.reference}: {placed.path} is missing from {directory}"
        if actual != placed.entry.sha256:
            return _damage_text(placed.version, placed.entry, actual)
    return None


def _reference(layout: Sequence[_Placed]) -> str:
    """The version that is materialized; an adapter's own files come last."""
    return layout[-1].version.reference


def _num_bytes(layout: Sequence[_Placed]) -> int:
    return sum(placed.entry.size for placed in layout)


def _damage_text(version: ModelVersion, entry: FileEntry, actual: str) -> str:
    return (
        f"{version.reference}: {entry.path} is damaged: sha256 {actual}, published as {entry.sha256}; "
        f"run `manta models verify {version.reference} --remove-damaged` and import it again"
    )


def _temporary(folder: Path) -> Path:
    path = folder / f"{TEMPORARY_PREFIX}{os.getpid()}-{uuid.uuid4().hex}"
    folder.mkdir(parents=True, exist_ok=True)
    return path
