"""Checkpoints of a run: tensors in at a step, a committed directory out some steps later, and back in at the start.

Training stops for as long as it takes to copy the tensors to host memory. Writing, digests, commit and the removal
of old ones happen on a thread of each worker, with a process group of its own, so that no collective of training is
in its way. One save is under way at a time.
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from train_jobs.trainer import committed
from train_jobs.trainer.errors import CheckpointError
from train_jobs.trainer.spec import CheckpointSpec
from train_jobs.trainer.state import expect_lone_process
from train_jobs.trainer.world import World

logger = logging.getLogger(__name__)

T = TypeVar("T")

SPARE_BYTES = 1 << 20
"""What a checkpoint takes besides its tensors, and more."""


class Checkpoints:
    """The checkpoints below ``root``, which every worker can reach. Each method is called by all workers, in step."""

    def __init__(self, root: Path, spec: CheckpointSpec, mode: Literal["min", "max"], world: World) -> None:
        self.root = root
        self._spec = spec
        self._mode = mode
        self._world = world
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=world.device.type == "cuda",
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=world.device.type == "cuda",
            )
        )
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write-checkpoint")
        self._saving: Future[Path] | None = None

    def find(self) -> tuple[committed.Meta | None, tuple[str, ...]]:
        """The newest whole checkpoint, and what is wrong with the newer ones, which are set aside.

        None when there is none at all; CheckpointError when there are some and all are damaged.
        """
        if self._world.rank == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            committed.remove_uncommitted(self.root)
        steps = self._gather(committed.committed_steps(self.root) if self._world.rank == 0 else [])[0]
        problems: list[str] = []
        for step in reversed(steps):
            directory = committed.checkpoint_directory(self.root, step)
            damage = committed.find_damage(directory, share=self._world.rank, num_shares=self._world.size)
            found = [one for one in self._gather(damage) if one is not None]
            if not found:
                return committed.read_meta(directory), tuple(problems)
            problems += found
            logger.warning("checkpoint after step %d is damaged: %s; falling back to the one before", step, found[0])
            if self._world.rank == 0:
                committed.set_aside(directory)
        if problems:
            raise CheckpointError(
                f"{self.root}: every checkpoint is damaged: {'; '.join(problems)}; delete the folder to start over"
            )
        return None, ()

    def save(
        self, tensors: dict[str, torch.Tensor], meta: committed.Meta, evaluation: committed.Evaluation | None = None
    ) -> None:
        """Copy the tensors and begin to save them; the checkpoint exists when :meth:`wait` returns its path."""
        assert self._saving is None, "the save before has not been waited for"
        expect_lone_process()
        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)
        self._saving = self._writer.submit(self._write, staged, meta, evaluation)

    @property
    def finished(self) -> bool:
        """Whether this worker's part of a save is over, well or not, and :meth:`wait` has not been called since."""
        return self._saving is not None and self._saving.done()

    @property
    def failed(self) -> bool:
        """Whether this worker's part of a save has failed, and :meth:`wait` has not been called since."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> Path | None:
        """The checkpoint that was being saved, once it is committed; CheckpointError when it could not be."""
        if self._saving is None:
            return None
        saving, self._saving = self._saving, None
        return saving.result()

    def close(self) -> None:
        """End the threads; a save under way is finished first."""
        self._writer.shutdown(wait=True)
        self._stager.close()

    def _write(self, staged: dict[str, Any], meta: committed.Meta, evaluation: committed.Evaluation | None) -> Path:
        directory = committed.checkpoint_directory(self.root, meta.step)
        try:
            self._phase(directory, lambda: self._make_room(directory, staged))
            self._save_tensors(directory, staged)
            digests = self._phase(directory, lambda: self._digest(directory))
            files = {name: digest for found in digests for name, digest in found.items()}
            self._phase(directory, lambda: self._commit(directory, meta, files, evaluation))
        except CheckpointError:
            if self._world.rank == 0 and not (directory / committed.COMMITTED).exists():
                shutil.rmtree(directory, ignore_errors=True)
            raise
        return directory

    def _phase(self, directory: Path, work: Callable[[], T]) -> list[T]:
        """Do one thing on all workers; returns what each got, or raises CheckpointError on all of them."""
        value, problem = None, None
        try:
            value = work()
        except OSError as error:
            problem = _advice(directory, error)
        outcomes = self._gather((value, problem))
        for _, found in outcomes:
            if found is not None:
                raise CheckpointError(found)
        return [cast(T, value) for value, _ in outcomes]

    def _make_room(self, directory: Path, staged: dict[str, Any]) -> None:
        if self._world.rank != 0:
            return
        directory.mkdir(parents=True, exist_ok=True)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in staged.values()) + SPARE_BYTES
        if shutil.disk_usage(directory).free < needed:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}; {needed} bytes are needed")

    def _save_tensors(self, directory: Path, staged: dict[str, Any]) -> None:
        writer = FileSystemWriter(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
        try:
            save_distributed(staged, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise CheckpointError(f"worker {rank}: {_advice(directory, cause)}") from error

    def _digest(self, directory: Path) -> dict[str, committed.FileDigest]:
        rank = self._world.rank
        names = [path.name for path in directory.glob(f"__{rank}_*.distcp")]
        return committed.digest_files(directory, [*names, ".metadata"] if rank == 0 else names)

    def _commit(
        self,
        directory: Path,
        meta: committed.Meta,
        files: dict[str, committed.FileDigest],
        evaluation: committed.Evaluation | None,
    ) -> None:
        if self._world.rank == 0:
            committed.commit(directory, meta, files, evaluation)
            spec = self._spec
            committed.retain(self.root, keep_last=spec.keep_last, keep_best=spec.keep_best, mode=self._mode)

    def _gather(self, value: T) -> list[T]:
        if self._group is None:
            return [value]
        values: list[T] = [value] * self._world.size
        dist.all_gather_object(values, value, group=self._group)
        return values


def _advice(directory: Path, cause: BaseException) -> str:
    """What to tell the user about a failed save."""
    free = shutil.disk_usage(directory.parent).free
    text = f"{directory}: the checkpoint could not be written: {cause} ({free} bytes free); those before are intact"
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text += "; free some space, lower checkpoint.keep_last, or move storage, and submit again"
    return text
