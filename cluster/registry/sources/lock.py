"""One import of one source at a time, and a work folder for it that never outlives it for long.

The lock is the kernel's (``flock``), so a killed process frees it; the work folder it leaves is deleted by the next
import of anything.
"""

import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.registry.progress import Progress
from cluster.registry.tree import remove_folder


@contextmanager
def import_lock(folder: Path, key: str, progress: Progress) -> Iterator[Path]:
    """An empty work folder under ``folder`` that belongs to the holder of ``key`` alone; deleted at the end.

    Waits while another process holds the same key. Folders of killed imports are deleted first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    descriptor = _lock(_lock_path(folder, digest), progress)
    work = folder / f"{digest}.{uuid.uuid4().hex[:8]}"  # never the folder of a killed import's surviving child
    try:
        work.mkdir()
        yield work
    finally:
        remove_folder(work)
        os.close(descriptor)


def _lock(path: Path, progress: Progress) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(descriptor):
            progress("waiting for another import of the same source", 0, None, "steps")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(folder: Path) -> None:
    for work in folder.iterdir():
        if not work.is_dir():
            continue
        descriptor = os.open(_lock_path(folder, work.name.partition(".")[0]), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if _try_lock(descriptor):  # otherwise a living import works there
                remove_folder(work)
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_path(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.lock"
