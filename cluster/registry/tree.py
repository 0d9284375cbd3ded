"""The file operations the registry is built on: a folder on a local disk or on any fsspec URI.

Everything the registry promises rests on three of them: ``create`` makes a whole file or finds one there (never half
a file, never two winners), ``replace`` swaps a whole file, ``put`` adds a whole immutable file. Paths are relative to
the folder, with '/' between names.
"""

import hashlib
import os
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlsplit

import fsspec
from fsspec import AbstractFileSystem
from typing_extensions import override

from cluster.durable import sync_folder
from cluster.errors import RegistryError

CHUNK_BYTES = 4 * 2**20
TEMPORARY_PREFIX = ".tmp-"

BytesDone = Callable[[int], None]
"""Called with the number of bytes handled since the last call."""


class Tree(ABC):
    """A folder. Missing files raise FileNotFoundError; everything else the file system says passes through."""

    uri: str

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The file's bytes."""

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """A seekable reader; the caller closes it."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Bytes in the file; None when there is none."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of files and folders in ``folder``, sorted, without temporary files; empty when it does not exist."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Write a new file, whole or not at all; False when it exists already."""

    @abstractmethod
    def replace(self, path: str, data: bytes) -> None:
        """Write a file, new or over an old one, whole or not at all."""

    @abstractmethod
    def append(self, path: str, data: bytes) -> None:
        """Add to the end of a file, new or old; a crash may leave a part of ``data``."""

    @abstractmethod
    def put(self, source: Path, path: str, done: BytesDone) -> None:
        """Copy a local file in, whole or not at all."""

    @abstractmethod
    def get(self, path: str, target: Path, done: BytesDone) -> None:
        """Copy a file out to a local path."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Delete a file; nothing happens when there is none."""

    @abstractmethod
    def age_s(self, path: str) -> float:
        """Seconds since the file was written or refreshed."""

    @abstractmethod
    def refresh(self, path: str) -> bool:
        """Make the file young again, where that is cheap; False where the file must be written anew for that."""

    @abstractmethod
    def stale_temporaries(self, older_than_s: float) -> list[str]:
        """Paths of temporary files that an interrupted write left behind."""


def open_tree(uri: str) -> Tree:
    """The folder at ``uri``: an absolute or ``~`` path, ``file://``, or any URI that fsspec knows."""
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file"):
        path = Path(uri.removeprefix("file://")).expanduser()
        if not path.is_absolute():
            raise RegistryError(
                f"storage {uri!r} is relative; write an absolute path, ~/..., or a URI such as s3://bucket/x"
            )
        return LocalTree(path)
    try:
        filesystem, root = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise RegistryError(f"storage {uri!r} cannot be opened: {error}") from error
    return RemoteTree(filesystem, root, uri)


class LocalTree(Tree):
    """A folder on a local (or POSIX-like shared) disk: temporary file, fsync, then link or rename."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def local_path(self, path: str) -> Path:
        """Where ``path`` lies on this machine."""
        return self.root / path

    @override
    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    @override
    def open(self, path: str) -> BinaryIO:
        return (self.root / path).open("rb")

    @override
    def size(self, path: str) -> int | None:
        try:
            return (self.root / path).stat().st_size
        except FileNotFoundError:
            return None

    @override
    def names(self, folder: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.root / folder) if not name.startswith(TEMPORARY_PREFIX))
        except FileNotFoundError:
            return []

    @override
    def create(self, path: str, data: bytes) -> bool:
        temporary = self._write_temporary(path, data)
        try:
            os.link(temporary, self.root / path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        sync_folder((self.root / path).parent)
        return True

    @override
    def replace(self, path: str, data: bytes) -> None:
        os.replace(self._write_temporary(path, data), self.root / path)
        sync_folder((self.root / path).parent)

    @override
    def append(self, path: str, data: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as file:
            file.write(data)

    @override
    def put(self, source: Path, path: str, done: BytesDone) -> None:
        temporary = self._temporary(path)
        try:
            with source.open("rb") as reader, temporary.open("xb") as writer:
                for chunk in _chunks(reader):
                    writer.write(chunk)
                    done(len(chunk))
                writer.flush()
                os.fsync(writer.fileno())
            temporary.chmod(0o444)
            os.replace(temporary, self.root / path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder((self.root / path).parent)

    @override
    def get(self, path: str, target: Path, done: BytesDone) -> None:
        with (self.root / path).open("rb") as reader, target.open("wb") as writer:
            for chunk in _chunks(reader):
                writer.write(chunk)
                done(len(chunk))

    @override
    def remove(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)
        with suppress(OSError):  # the folder still holds something: it stays
            (self.root / path).parent.rmdir()

    @override
    def age_s(self, path: str) -> float:
        return time.time() - (self.root / path).stat().st_mtime

    @override
    def refresh(self, path: str) -> bool:
        os.utime(self.root / path)
        return True

    @override
    def stale_temporaries(self, older_than_s: float) -> list[str]:
        found = (path for path in self.root.rglob(f"{TEMPORARY_PREFIX}*") if path.is_file())
        names = [path.relative_to(self.root).as_posix() for path in found]
        return sorted(name for name in names if self.age_s(name) >= older_than_s)

    def _temporary(self, path: str) -> Path:
        folder = (self.root / path).parent
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{TEMPORARY_PREFIX}{os.getpid()}-{uuid.uuid4().hex}"

    def _write_temporary(self, path: str, data: bytes) -> Path:
        temporary = self._temporary(path)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return temporary


class RemoteTree(Tree):
    """A folder on an object store or anything else that fsspec opens.

    An object appears whole when its upload ends, and ``create`` asks the store for put-if-absent (``mode="create"``).
    A file system of fsspec that has no such request falls back to look-then-write: there, publish from one place at a
    time.
    """

    def __init__(self, filesystem: AbstractFileSystem, root: str, uri: str) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.uri = uri

    def _path(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    @override
    def read(self, path: str) -> bytes:
        return cast(bytes, self.filesystem.cat_file(self._path(path)))

    @override
    def open(self, path: str) -> BinaryIO:
        return cast(BinaryIO, self.filesystem.open(self._path(path), "rb"))

    @override
    def size(self, path: str) -> int | None:
        try:
            return int(self.filesystem.info(self._path(path))["size"])
        except FileNotFoundError:
            return None

    @override
    def names(self, folder: str) -> list[str]:
        self.filesystem.invalidate_cache(self._path(folder))
        try:
            found = self.filesystem.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)

    @override
    def create(self, path: str, data: bytes) -> bool:
        self._make_parent(path)
        try:
            self.filesystem.pipe_file(self._path(path), data, mode="create")
        except FileExistsError:
            return False
        return True

    @override
    def replace(self, path: str, data: bytes) -> None:
        self._make_parent(path)
        self.filesystem.pipe_file(self._path(path), data)

    @override
    def append(self, path: str, data: bytes) -> None:
        before = self.read(path) if self.size(path) is not None else b""
        self.replace(path, before + data)

    @override
    def put(self, source: Path, path: str, done: BytesDone) -> None:
        self._make_parent(path)
        self.filesystem.put_file(str(source), self._path(path))
        done(source.stat().st_size)

    @override
    def get(self, path: str, target: Path, done: BytesDone) -> None:
        with self.open(path) as reader, target.open("wb") as writer:
            for chunk in _chunks(reader):
                writer.write(chunk)
                done(len(chunk))

    @override
    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.rm_file(self._path(path))

    @override
    def age_s(self, path: str) -> float:
        return time.time() - float(self.filesystem.modified(self._path(path)).timestamp())

    @override
    def refresh(self, path: str) -> bool:
        return False

    @override
    def stale_temporaries(self, older_than_s: float) -> list[str]:
        return []

    def _make_parent(self, path: str) -> None:
        self.filesystem.makedirs(self._path(path).rsplit("/", 1)[0], exist_ok=True)


def file_sha256(path: Path, done: BytesDone | None = None) -> str:
    """Hex sha256 of a local file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in _chunks(file):
            digest.update(chunk)
            if done is not None:
                done(len(chunk))
    return digest.hexdigest()


def remove_folder(path: Path) -> None:
    """Delete a local folder and everything in it; nothing happens when there is none."""
    if path.exists():
        shutil.rmtree(path)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
