"""Checkpoint directories on disk: what was written in, a commit; what is there in, which are whole.

``step-<n>/`` holds torch's files, ``meta.json``, ``digests.json`` over all of them, and ``COMMITTED``, written last,
which holds the digest of ``digests.json``. A directory without it does not exist for anybody. ``evaluation.json``
comes with the commit, or later, from whoever evaluates beside the training; the digests leave it out.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from cluster.durable import sync_folder, write_durably, write_json_durably
from cluster.registry.tree import file_sha256
from train_jobs.trainer.errors import TrainingError

CHECKPOINTS = "checkpoints"
"""Folder of a run directory that they lie in."""
COMMITTED = "COMMITTED"
DIGESTS = "digests.json"
META = "meta.json"
EVALUATION = "evaluation.json"

_STEP = re.compile(r"step-(\d+)")


class Meta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint says about itself, besides the tensors."""

    step: int
    """Optimizer steps done; the next one to do has this number."""
    to_evaluate: bool
    """An evaluation was due after this step."""
    defining: dict[str, Any]
    """What every attempt of the run must agree on: dotted path -> value."""
    num_workers: int
    strategy: str


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured of a checkpoint."""

    metrics: dict[str, Any]
    score: float | None
    """The metric that decides which checkpoint is best; None is not a number, and never the best."""


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


def commit(
    directory: Path, meta: Meta, files: Mapping[str, FileDigest], evaluation: Evaluation | None = None
) -> None:
    """Write what remains: meta, the digests of all files, then the marker; each is on disk before the next."""
    if evaluation is not None:
        write_evaluation(directory, evaluation)
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


def rated(metrics: Mapping[str, Any], metric: str) -> Evaluation:
    """The metrics with their score; TrainingError when they lack what is compared."""
    if metric not in metrics:
        raise TrainingError(f"evaluate.metric: the evaluation gives no {metric}; it gives {', '.join(metrics)}")
    return Evaluation(metrics=dict(metrics), score=float(metrics[metric]))


def write_evaluation(directory: Path, evaluation: Evaluation) -> None:
    """Say what was measured of a checkpoint; from then on it may be removed."""
    write_json_durably(directory / EVALUATION, evaluation)


def read_evaluation(directory: Path) -> Evaluation | None:
    """What was measured of a checkpoint; None when nothing was, or when it cannot be read any more."""
    try:
        return msgspec.json.decode((directory / EVALUATION).read_bytes(), type=Evaluation)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def awaiting_evaluation(root: Path) -> list[int]:
    """Steps of the committed checkpoints that are to be evaluated and are not yet, oldest first."""
    return [step for step in committed_steps(root) if _awaits(checkpoint_directory(root, step))]


def _awaits(directory: Path) -> bool:
    try:
        missing = read_meta(directory).to_evaluate and read_evaluation(directory) is None
    except FileNotFoundError:
        return False
    return missing and (directory / COMMITTED).is_file()  # somebody may be deleting it, and has deleted this first


def best_steps(root: Path, mode: Literal["min", "max"]) -> list[int]:
    """Steps of the committed checkpoints that have a score, the best one first, of equal ones the oldest."""
    found = {step: read_evaluation(checkpoint_directory(root, step)) for step in committed_steps(root)}
    scores = {step: one.score for step, one in found.items() if one is not None and one.score is not None}
    return sorted(scores, key=lambda step: scores[step] if mode == "min" else -scores[step])


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
        read_meta(directory)
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
    """Delete all committed checkpoints but the newest, the best, and those that wait for their evaluation.

    Returns the steps that stay.
    """
    steps = committed_steps(root)
    stay = sorted({*steps[-keep_last:], *best_steps(root, mode)[:keep_best], *awaiting_evaluation(root)})
    for step in steps:
        if step not in stay:
            directory = checkpoint_directory(root, step)
            (directory / COMMITTED).unlink()  # first, so that half a deletion is no checkpoint
            shutil.rmtree(directory)
    return stay
