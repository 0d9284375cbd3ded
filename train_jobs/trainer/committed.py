"""Checkpoint directories on disk: what was written in, a commit; what is there in, which are whole.

``step-<n>/`` holds torch's files, ``meta.json``, ``digests.json`` over all of them, and ``COMMITTED``, written last,
which holds the digest of ``digests.json``. A directory without it does not exist for anybody.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from cluster.durable import sync_folder, write_durably
from cluster.registry.tree import file_sha256

CHECKPOINTS = "checkpoints"
"""Folder of a run directory that they lie in."""
COMMITTED = "COMMITTED"
DIGESTS = "digests.json"
META = "meta.json"

_STEP = re.compile(r"step-(\d+)")


class Meta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint says about itself, besides the tensors."""

    step: int
    """Optimizer steps done; the next one to do has this number."""
    metrics: dict[str, Any]
    """Of the evaluation at this step; empty where there was none."""
    score: float | None
    """The metric that decides which checkpoint is best."""
    best_score: float | None
    """The best one of the run so far."""
    best_step: int | None
    defining: dict[str, Any]
    """What every attempt of the run must agree on: dotted path -> value."""
    num_workers: int
    strategy: str


class FileDigest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file; ``size`` in bytes."""

    size: int
    sha256: str


def checkpoint_directory(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return root / f"step-{step}"


def committed_steps(root: Path) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    return sorted(step for step, path in _directories(root) if (path / COMMITTED).is_file())


def newest_step(root: Path) -> int | None:
    """Steps that the newest committed checkpoint holds; None when there is none."""
    return max(committed_steps(root), default=None)


def remove_uncommitted(root: Path) -> None:
    """Delete what attempts that died have left; only while nobody saves."""
    for _, path in _directories(root):
        if not (path / COMMITTED).is_file():
            shutil.rmtree(path)


def _directories(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    found = [(_STEP.fullmatch(path.name), path) for path in root.iterdir()]
    return [(int(match.group(1)), path) for match, path in found if match]


def digest_files(directory: Path, names: Sequence[str]) -> dict[str, FileDigest]:
    """Sizes and digests of files of a directory."""
    return {
        name: FileDigest(size=(directory / name).stat().st_size, sha256=file_sha256(directory / name))
        for name in names
    }


def commit(directory: Path, meta: Meta, files: Mapping[str, FileDigest]) -> None:
    """Write what remains: meta, the digests of all files, then the marker; each is on disk before the next."""
    write_durably(directory / META, msgspec.json.encode(meta))
    everything = dict(files) | digest_files(directory, [META])
    write_durably(directory / DIGESTS, msgspec.json.encode(everything, order="sorted"))
    sync_folder(directory)
    write_durably(directory / COMMITTED, file_sha256(directory / DIGESTS).encode())
    sync_folder(directory)
    sync_folder(directory.parent)


def read_meta(directory: Path) -> Meta:
    """What the checkpoint says about itself."""
    return msgspec.json.decode((directory / META).read_bytes(), type=Meta)


def find_damage(directory: Path, *, share: int = 0, num_shares: int = 1) -> str | None:
    """The first thing wrong with a committed checkpoint, or None; this caller reads every ``num_shares``-th file."""
    try:
        if file_sha256(directory / DIGESTS) != (directory / COMMITTED).read_text():
            return f"{directory / DIGESTS} is not what was committed"
        files = msgspec.json.decode((directory / DIGESTS).read_bytes(), type=dict[str, FileDigest])
        for name in sorted(files)[share::num_shares]:
            path = directory / name
            size = path.stat().st_size
            if size != files[name].size:
                return f"{path} has {size} bytes, and {files[name].size} were committed"
            if file_sha256(path) != files[name].sha256:
                return f"{path} has another digest than the one that was committed"
    except (OSError, msgspec.MsgspecError) as error:
        return f"{directory} cannot be read: {error}"
    return None


def set_aside(directory: Path) -> Path:
    """Rename a damaged checkpoint, so that it is not looked at again; returns its new path."""
    number = 0
    while (target := directory.with_name(f"{directory.name}.damaged-{number}")).exists():
        number += 1
    return directory.rename(target)


def retain(root: Path, *, keep_last: int, keep_best: int, mode: Literal["min", "max"]) -> list[int]:
    """Delete all committed checkpoints but the newest and the best; returns the steps that stay."""
    steps = committed_steps(root)
    scores = {step: read_meta(checkpoint_directory(root, step)).score for step in steps} if keep_best else {}
    rated = [(score if mode == "max" else -score, step) for step, score in scores.items() if score is not None]
    best = [step for _, step in sorted(rated, reverse=True)[:keep_best]]
    stay = sorted({*steps[-keep_last:], *best})
    for step in steps:
        if step not in stay:
            directory = checkpoint_directory(root, step)
            (directory / COMMITTED).unlink()  # first, so that half a deletion is no checkpoint
            shutil.rmtree(directory)
    return stay
