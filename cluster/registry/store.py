"""The store: a directory goes in as immutable blobs and one manifest, and a version comes out, named and listed.

    <storage>/registry/blobs/sha256/<aa>/<digest>
    <storage>/registry/models/<name>/versions/<vN>/manifest.json    written last: the commit
    <storage>/registry/models/<name>/versions/<vN>/reused-at        a publisher relies on it (seconds)
    <storage>/registry/models/<name>/versions/<vN>/deleted.json     manifest of a version GC removed: keeps its number

Until its manifest exists a version does not exist, so an interrupted publish leaves nothing that can be loaded, only
blobs for GC. A version's number is never given twice.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import BinaryIO

from cluster.errors import RegistryError
from cluster.registry.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter_config
from cluster.registry.alias import Aliases, AliasMove
from cluster.registry.manifest import (
    FileEntry,
    ModelVersion,
    VersionSpec,
    check_model_name,
    check_version_name,
    content_digest,
    is_version_name,
    parse_manifest,
)
from cluster.registry.progress import ByteCount, Progress, no_progress
from cluster.registry.tree import LocalTree, Tree, file_sha256, open_tree

FRESH_BLOB_S = 1800.0
"""A blob of an object store older than this is uploaded again rather than relied on: GC may be looking at it."""


class Registry:
    """The versions and aliases under ``<storage>/registry``; any number of processes may use it at once.

    ``cache`` is a local folder for downloads and materialized versions: ``<storage>/cache`` for a local storage,
    ``~/.cache/manta/<digest of the URI>`` for any other.
    """

    def __init__(self, storage: str, *, cache: Path | None = None, tree: Tree | None = None) -> None:
        self.storage = storage
        self.tree = tree if tree is not None else open_tree(f"{storage.rstrip('/')}/registry")
        self.cache = cache if cache is not None else _default_cache(storage, self.tree)
        self.aliases = Aliases(self.tree)

    def names(self) -> list[str]:
        """Models with at least one version, sorted."""
        return [name for name in self.tree.names("models") if self.versions(name)]

    def versions(self, name: str) -> list[ModelVersion]:
        """Published versions of ``name``, oldest first; empty for an unknown model."""
        found = (self._read_manifest(name, version) for version in self._numbered(name))
        return [manifest for manifest in found if manifest is not None]

    def get(self, name: str, version: str) -> ModelVersion:
        """One version; RegistryError naming those that exist when there is none."""
        manifest = self._read_manifest(check_model_name(name), check_version_name(version))
        if manifest is None:
            raise RegistryError(f"{name}@{version} is not in {self.tree.uri}; {self._what_exists(name)}")
        return manifest

    def resolve(self, reference: str) -> ModelVersion:
        """The version that ``model@alias`` or ``model@vN`` names now; without ``@``, alias ``latest``."""
        name, _, selector = reference.partition("@")
        selector = selector or "latest"
        if is_version_name(selector):
            return self.get(name, selector)
        move = self.aliases.read(name, selector)
        if move is None:
            raise RegistryError(f"{name}@{selector}: no such alias in {self.tree.uri}; {self._what_exists(name)}")
        return self.get(name, move.version)

    def set_alias(
        self, name: str, alias: str, version: str, *, reason: str, expected_generation: int | None = None
    ) -> AliasMove:
        """Point an alias at an existing version; see ``Aliases.set`` for the race and its error."""
        self.get(name, version)
        return self.aliases.set(name, alias, version, reason=reason, expected_generation=expected_generation)

    def rollback(self, name: str, alias: str, *, reason: str) -> AliasMove:
        """Point an alias at the version before; RegistryError when there is none or GC has removed it."""
        current = self.aliases.read(name, alias)
        if current is not None and current.previous is not None:
            self.get(name, current.previous)
        generation = None if current is None else current.generation
        return self.aliases.rollback(name, alias, reason=reason, expected_generation=generation)

    def publish(
        self, name: str, directory: Path, spec: VersionSpec, *, progress: Progress = no_progress
    ) -> ModelVersion:
        """Make a version of every file under ``directory``, or find the one with the same content.

        Safe against other publishers, and at any point of interruption. RegistryError for an adapter that no server
        could read, or whose base is not a whole model in this registry.
        """
        check_model_name(name)
        paths = _list_files(directory)
        self._check_adapter(directory, paths, spec)
        files = _measure(directory, paths, progress)
        self._put_blobs(directory, files, progress)
        highest = self._highest_number(name)  # before the look: whoever commits after it is met in _commit
        version = self._reuse(name, content_digest(files, spec)) or self._commit(name, files, spec, highest + 1)
        self._put_blobs(directory, files, no_progress)  # what a GC took between the look and the commit
        return version

    def _check_adapter(self, directory: Path, paths: list[str], spec: VersionSpec) -> None:
        if spec.adapter_of is None:
            if CONFIG_NAME in paths:
                raise RegistryError(f"{directory} is an adapter ({CONFIG_NAME}); say of which version: adapter_of")
            return
        missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if name not in paths]
        if missing:
            raise RegistryError(
                f"{directory} is no adapter as peft writes them: it has no {' and no '.join(missing)}"
            )
        read_adapter_config(directory / CONFIG_NAME)
        base = self.resolve(spec.adapter_of)
        if base.adapter_of is not None or base.task != spec.task:
            kind = "an adapter itself" if base.adapter_of is not None else f"a model for task {base.task}"
            raise RegistryError(
                f"an adapter for task {spec.task} cannot adapt {base.reference}, which is {kind}; publish it merged"
            )
        self.tree.replace(reused_path(base.name, base.version), str(int(time.time())).encode())
        self.resolve(spec.adapter_of)  # GC looks at that note after its tombstone, so one of the two sees the other

    def complete(self, version: ModelVersion) -> bool:
        """Whether every blob is there with its size; ``materialize.verify`` also reads them."""
        return all(self.tree.size(blob_path(entry.sha256)) == entry.size for entry in version.files)

    def open_file(self, version: ModelVersion, path: str) -> BinaryIO:
        """A seekable reader of one file, straight from its blob, unverified. For small reads such as headers."""
        entry = version.file(path)
        try:
            return self.tree.open(blob_path(entry.sha256))
        except FileNotFoundError as error:
            raise RegistryError(f"{version.reference}: the blob of {path} is missing ({entry.sha256})") from error

    def read_file(self, version: ModelVersion, path: str) -> bytes:
        """One file's bytes, verified; RegistryError when they are not the published ones."""
        with self.open_file(version, path) as file:
            data = file.read()
        entry = version.file(path)
        actual = hashlib.sha256(data).hexdigest()
        if actual != entry.sha256:
            raise RegistryError(
                f"{version.reference}: {path} is damaged: sha256 {actual}, published as {entry.sha256}; "
                "import it again"
            )
        return data

    def deleted(self, name: str, version: str) -> bool:
        """Whether GC has removed this version."""
        return self.tree.size(tombstone_path(name, version)) is not None

    def half_deleted(self) -> list[ModelVersion]:
        """Versions whose removal was interrupted: the tombstone is there, and the manifest still is."""
        found = []
        for name in self.tree.names("models"):
            for version in self._numbered(name):
                path = manifest_path(name, version)
                if self.deleted(name, version) and self.tree.size(path) is not None:
                    found.append(parse_manifest(self.tree.read(path), f"{self.tree.uri}/{path}"))
        return found

    def _numbered(self, name: str) -> list[str]:
        found = [
            entry for entry in self.tree.names(f"models/{check_model_name(name)}/versions") if is_version_name(entry)
        ]
        return sorted(found, key=lambda version: int(version[1:]))

    def _read_manifest(self, name: str, version: str) -> ModelVersion | None:
        path = manifest_path(name, version)
        try:
            manifest = parse_manifest(self.tree.read(path), f"{self.tree.uri}/{path}")
        except FileNotFoundError:
            return None
        if (manifest.name, manifest.version) != (name, version):
            raise RegistryError(f"{self.tree.uri}/{path} says it is {manifest.reference}: it was moved; move it back")
        return None if self.deleted(name, version) else manifest

    def _reuse(self, name: str, digest: str) -> ModelVersion | None:
        for manifest in self.versions(name):
            if manifest.content_digest == digest:
                self.tree.replace(reused_path(name, manifest.version), str(int(time.time())).encode())
                if not self.deleted(name, manifest.version):
                    return manifest
        return None

    def _put_blobs(self, directory: Path, files: tuple[FileEntry, ...], progress: Progress) -> None:
        missing = {entry.sha256: entry for entry in files if not self._blob_is_safe(entry)}
        count = ByteCount(progress, "storing", sum(entry.size for entry in missing.values()))
        for entry in missing.values():
            self.tree.put(directory / entry.path, blob_path(entry.sha256), count.add)

    def _blob_is_safe(self, entry: FileEntry) -> bool:
        path = blob_path(entry.sha256)
        try:
            if self.tree.size(path) != entry.size:
                return False
            return self.tree.refresh(path) or self.tree.age_s(path) < FRESH_BLOB_S
        except FileNotFoundError:
            return False

    def _highest_number(self, name: str) -> int:
        """0 when there is none; folders without a manifest are of publishers that died, or have not committed yet."""
        for version in reversed(self._numbered(name)):
            if self.tree.size(manifest_path(name, version)) is not None or self.deleted(name, version):
                return int(version[1:])
        return 0

    def _commit(self, name: str, files: tuple[FileEntry, ...], spec: VersionSpec, number: int) -> ModelVersion:
        digest = content_digest(files, spec)
        while True:
            manifest = ModelVersion(
                **dict(spec), name=name, version=f"v{number}", files=files, created=int(time.time())
            )
            if self.tree.create(manifest_path(name, manifest.version), manifest.to_json()):
                return manifest
            winner = self._read_manifest(name, manifest.version)
            if winner is not None and winner.content_digest == digest:
                return winner
            number += 1

    def _what_exists(self, name: str) -> str:
        versions = ", ".join(manifest.version for manifest in self.versions(name))
        aliases = ", ".join(self.aliases.names(name))
        if not versions:
            return f"models there: {', '.join(self.names()) or 'none'}; bring one in with `manta models import`"
        return f"versions of {name}: {versions}; aliases: {aliases or 'none'}"


def blob_path(sha256: str) -> str:
    """Where the blob with this digest lies in the tree."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def manifest_path(name: str, version: str) -> str:
    """Where the manifest of ``name@version`` lies in the tree."""
    return f"models/{name}/versions/{version}/manifest.json"


def tombstone_path(name: str, version: str) -> str:
    """Where the manifest of a removed version lies in the tree."""
    return f"models/{name}/versions/{version}/deleted.json"


def reused_path(name: str, version: str) -> str:
    """Where a publisher notes that it relies on a version that was there already."""
    return f"models/{name}/versions/{version}/reused-at"


def _default_cache(storage: str, tree: Tree) -> Path:
    if isinstance(tree, LocalTree):
        return tree.root.parent / "cache"
    return Path.home() / ".cache" / "manta" / hashlib.sha256(storage.encode()).hexdigest()[:16]


def _list_files(directory: Path) -> list[str]:
    paths = [
        (Path(folder) / name).relative_to(directory).as_posix()
        for folder, _, names in os.walk(directory, followlinks=True)
        for name in names
    ]
    if not any(path.endswith(".safetensors") for path in paths):
        raise RegistryError(f"{directory} holds no .safetensors file; only safetensors are published")
    return sorted(paths)


def _measure(directory: Path, paths: list[str], progress: Progress) -> tuple[FileEntry, ...]:
    sizes = {path: (directory / path).stat().st_size for path in paths}
    count = ByteCount(progress, "hashing", sum(sizes.values()))
    return tuple(
        FileEntry(path=path, size=size, sha256=file_sha256(directory / path, count.add))
        for path, size in sizes.items()
    )
