"""Training attempts in processes of their own that talk gloo on the loopback: cases in, what each worker saw out."""

import multiprocessing
import os
import pickle
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.runs.log import StepReport
from tests.support.tiny_task import TinyShards, TinyTask
from train_jobs.trainer.errors import TrainingError
from train_jobs.trainer.hooks import NoHooks, StopRequest, TrainResult
from train_jobs.trainer.loop import Trainer
from train_jobs.trainer.spec import TrainSpec
from train_jobs.trainer.world import World

_PRELOADED = [__name__, "tests.support.tiny_tasks"]
"""What cases are made of: seconds of imports, once for all workers, since the server is started once and never
computes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attempt; the last worker gets SIGKILL when step ``kill_at`` begins, or asks to stop in ``stop_at``.

    Where it does not do every step, the first one that it does from there on counts.
    """

    spec: TrainSpec
    run_dir: Path
    dropout: float = 0.0
    kill_at: int | None = None
    stop_at: int | None = None
    full_at: int | None = None
    """From this step on the last worker cannot write files of more than 1 kB."""
    setup: Callable[[], tuple[Any, Any, Any]] | None = None
    """Makes the task, the data and the evaluation data; None takes the tiny task and its data."""


@dataclass
class Seen(NoHooks):
    """What one worker saw of one attempt."""

    case: Case
    rank: int = 0
    last_rank: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    sequence_ids: dict[int, list[int]] = field(default_factory=dict)
    result: TrainResult | None = None
    error: str | None = None
    step: int = 0

    def on_step(self, report: StepReport) -> None:
        self.losses.append(report.loss)
        self.norms.append(report.grad_norm)

    def on_checkpoint(self, path: Path) -> None:
        self.checkpoints.append(path.name)

    def heartbeat(self, step: int) -> None:
        self.step = step
        if self._is_last_at(self.case.kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._is_last_at(self.case.full_at):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    def should_stop(self) -> StopRequest:
        return "checkpoint_and_stop" if self._is_last_at(self.case.stop_at) else "no"

    def _is_last_at(self, step: int | None) -> bool:
        return step is not None and self.step >= step and self.rank == self.last_rank


@dataclass(frozen=True, kw_only=True)
class Group:
    """Workers that do ``cases`` in turn, and a new ``folder`` for what they leave."""

    num_workers: int
    folder: Path
    cases: list[Case]


def run_cases(num_workers: int, folder: Path, cases: list[Case]) -> list[list[Seen]]:
    """Each case in turn on the same workers; returns by worker, by case. A killed worker has seen nothing."""
    return run_groups(Group(num_workers=num_workers, folder=folder, cases=cases))[0]


def run_groups(*groups: Group) -> list[list[list[Seen]]]:
    """:func:`run_cases` of groups that know nothing of each other, all at once: no core waits for another's group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    workers = []
    for group in groups:
        group.folder.mkdir(parents=True)
        workers += [context.Process(target=_work, args=(rank, group)) for rank in range(group.num_workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [[_what_was_seen(group, rank) for rank in range(group.num_workers)] for group in groups]


def _what_was_seen(group: Group, rank: int) -> list[Seen]:
    path = group.folder / f"worker-{rank}"
    return pickle.loads(path.read_bytes()) if path.exists() else []


def _work(rank: int, group: Group) -> None:
    torch.set_num_threads(1)
    if group.num_workers > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = dist.FileStore(str(group.folder / "store"), group.num_workers)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=group.num_workers)
    seen = [_attempt(case, rank, group.num_workers) for case in group.cases]
    (group.folder / f"worker-{rank}").write_bytes(pickle.dumps(seen))
    if group.num_workers > 1:
        dist.destroy_process_group()


def _attempt(case: Case, rank: int, num_workers: int) -> Seen:
    seen = Seen(case, rank=rank, last_rank=num_workers - 1)
    tiny = (TinyTask(dropout=case.dropout), TinyShards(), TinyShards(8, seed=1))
    task, shards, evaluation_data = tiny if case.setup is None else case.setup()
    trainer = Trainer(
        spec=case.spec,
        task=task,
        shards=shards,
        evaluation_data=evaluation_data,
        run_dir=case.run_dir,
        world=World.current(),
        hooks=seen,
    )
    try:
        seen.result = trainer.run()
    except (TrainingError, RuntimeError) as error:  # gloo tells of a lost worker with a RuntimeError
        seen.error = f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seen.sequence_ids = tiny[0].seen
    return seen
