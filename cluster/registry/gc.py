"""Garbage collection: versions and blobs that nothing points at go away, in an order that a crash cannot hurt.

Kept: what an alias points at or would go back to, what is pinned, what the caller says is running, the newest
``keep_last`` of each model, everything younger than the grace period, and the bases of all adapters that stay. A
version goes by a tombstone first (``deleted.json``, which keeps its number and its lineage), then its manifest, then,
when no manifest names them, its blobs. A publisher that finds its bytes in the registry refreshes what it relies on
and looks again after its commit, so the two never meet half-way.
"""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from cluster.registry.manifest import ModelVersion, check_model_name, is_version_name
from cluster.registry.materialize import sweep_cache
from cluster.registry.store import Registry, blob_path, manifest_path, reused_path, tombstone_path

GRACE_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a collection removed, or would remove."""

    versions: tuple[str, ...]
    """``model@version``."""
    blobs: tuple[str, ...]
    """Digests."""
    freed_bytes: int
    temporaries: tuple[str, ...]
    """Left-overs of interrupted writes, as paths in the registry."""


def collect(
    registry: Registry,
    *,
    running: Iterable[str] = (),
    keep_last: int = 1,
    grace_s: float = GRACE_S,
    dry_run: bool = False,
    now: Callable[[], float] = time.time,
) -> Collected:
    """Remove what nothing needs and say what it was; with ``dry_run`` only say it.

    ``running`` holds ``model@version`` of what is served or read by jobs. ``keep_last`` is per model.
    """
    if not dry_run:
        for version in registry.half_deleted():
            _delete_version(registry, version, grace_s, now)
    doomed = _doomed_versions(registry, frozenset(running), keep_last, grace_s, now)
    if not dry_run:
        doomed = [version for version in doomed if _delete_version(registry, version, grace_s, now)]
    kept = _kept_digests(registry, without={version.reference for version in doomed})
    blobs = [digest for digest in _blobs(registry) if digest not in kept and _age(registry, digest, now) >= grace_s]
    freed_bytes = sum(registry.tree.size(blob_path(digest)) or 0 for digest in blobs)
    temporaries = registry.tree.stale_temporaries(grace_s)
    if not dry_run:
        _delete_blobs(registry, blobs)
        for path in temporaries:
            registry.tree.remove(path)
        sweep_cache(registry, grace_s=grace_s)
    return Collected(
        versions=tuple(version.reference for version in doomed),
        blobs=tuple(blobs),
        freed_bytes=freed_bytes,
        temporaries=tuple(temporaries),
    )


def pin(registry: Registry, version: ModelVersion, *, reason: str) -> None:
    """Keep ``version`` whatever else points at it."""
    registry.tree.replace(_pin_path(version.name, version.version), reason.encode() + b"\n")


def unpin(registry: Registry, version: ModelVersion) -> bool:
    """Take the pin away; False when there was none."""
    path = _pin_path(version.name, version.version)
    existed = registry.tree.size(path) is not None
    registry.tree.remove(path)
    return existed


def pins(registry: Registry, name: str) -> list[str]:
    """Pinned versions of ``name``."""
    return [
        version
        for version in registry.tree.names(f"models/{check_model_name(name)}/pins")
        if is_version_name(version)
    ]


def _doomed_versions(
    registry: Registry, running: frozenset[str], keep_last: int, grace_s: float, now: Callable[[], float]
) -> list[ModelVersion]:
    doomed = []
    for name in registry.names():
        versions = registry.versions(name)
        marked = _marked(registry, name) | {
            version.version for version in versions[max(0, len(versions) - keep_last) :]
        }
        doomed += [
            version
            for version in versions
            if version.version not in marked
            and version.reference not in running
            and now() - max(version.created, _reused_at(registry, version)) >= grace_s
        ]
    bases = _bases(registry, without={version.reference for version in doomed})
    doomed = [version for version in doomed if version.reference not in bases]
    return sorted(doomed, key=lambda version: version.adapter_of is None)  # adapters before their bases


def _bases(registry: Registry, without: Collection[str]) -> set[str]:
    """What the adapters adapt that stay."""
    versions = (version for name in registry.names() for version in registry.versions(name))
    return {v.adapter_of for v in versions if v.adapter_of is not None and v.reference not in without}


def _marked(registry: Registry, name: str) -> set[str]:
    moves = (registry.aliases.read(name, alias) for alias in registry.aliases.names(name))
    pointed = {version for move in moves if move is not None for version in (move.version, move.previous) if version}
    return pointed | set(pins(registry, name))


def _delete_version(registry: Registry, version: ModelVersion, grace_s: float, now: Callable[[], float]) -> bool:
    """Whether it is gone; False when an alias, a pin, an adapter or a publisher came for it in the meantime."""
    tombstone = tombstone_path(version.name, version.version)
    registry.tree.replace(tombstone, version.to_json())
    marked = _marked(registry, version.name)
    reused = now() - _reused_at(registry, version) < grace_s
    wanted = version.version in marked or reused or version.reference in _bases(registry, without=())
    if wanted:
        registry.tree.remove(tombstone)
        return False
    registry.tree.remove(manifest_path(version.name, version.version))
    registry.tree.remove(reused_path(version.name, version.version))
    return True


def _reused_at(registry: Registry, version: ModelVersion) -> float:
    path = reused_path(version.name, version.version)
    return float(registry.tree.read(path)) if registry.tree.size(path) is not None else 0.0


def _kept_digests(registry: Registry, without: set[str]) -> set[str]:
    versions = (version for name in registry.names() for version in registry.versions(name))
    return {entry.sha256 for version in versions if version.reference not in without for entry in version.files}


def _blobs(registry: Registry) -> list[str]:
    folders = registry.tree.names("blobs/sha256")
    return [digest for folder in folders for digest in registry.tree.names(f"blobs/sha256/{folder}")]


def _age(registry: Registry, digest: str, now: Callable[[], float]) -> float:
    return registry.tree.age_s(blob_path(digest)) + (now() - time.time())


def _delete_blobs(registry: Registry, blobs: list[str]) -> None:
    kept = _kept_digests(registry, without=set())  # manifests that were published since
    for digest in blobs:
        if digest not in kept:
            registry.tree.remove(blob_path(digest))


def _pin_path(name: str, version: str) -> str:
    return f"models/{name}/pins/{version}"
