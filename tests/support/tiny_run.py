"""A run of the tiny task: a RunSpec for it, and its materials, with mishaps on demand."""

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.control.code import code_digest
from tests.support.tiny_task import TinyShards, TinyTask, tiny_spec
from train_jobs.evaluation.errors import EvaluationError
from train_jobs.run_spec import RunSpec, WorkerNeeds
from train_jobs.trainer.errors import TrainingError
from train_jobs.trainer.materials import Materials
from train_jobs.trainer.spec import CheckpointSpec, Ddp, DurationSpec, Sgd
from train_jobs.trainer.task import LossParts, MicroBatch


@dataclass(frozen=True, kw_only=True)
class Mishaps:
    """What goes wrong, once each, in the worker of the highest rank."""

    folder: Path
    """Remembers, over all attempts, what has happened."""
    step_s: float = 0.0
    """Of each micro-batch, until ``hurry`` is in the folder."""
    kill_at: int | None = None
    kill_saving: bool = False
    """When the first checkpoint's tensors are written, before it is committed."""
    hang_at: int | None = None
    refuse_at: int | None = None
    refuse_evaluating: bool = False
    export_fails: bool = False

    def once(self, name: str) -> bool:
        """Whether this is the first time."""
        try:
            (self.folder / name).open("x").close()
        except FileExistsError:
            return False
        (self.folder / f"{name}-time").write_text(str(time.time()))
        return True


class MishapTask(TinyTask):
    """The tiny task; notes the sequences of each step, at each number of workers."""

    def __init__(self, mishaps: Mishaps) -> None:
        super().__init__()
        self.mishaps = mishaps
        self._rank = int(os.environ.get("RANK", "0"))
        self._last = self._rank == int(os.environ.get("WORLD_SIZE", "1")) - 1
        if mishaps.kill_saving and self._last:
            _die_before_commit(mishaps)

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> LossParts:
        """Of the tiny task, if nothing goes wrong before."""
        mishaps, step = self.mishaps, micro_batch.step
        if mishaps.step_s and not (mishaps.folder / "hurry").exists():
            time.sleep(mishaps.step_s)
        if self._last and step == mishaps.kill_at and mishaps.once("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._last and step == mishaps.hang_at and mishaps.once("hung"):
            time.sleep(3600)
        if self._last and step == mishaps.refuse_at:
            raise TrainingError(f"step {step}: the test wants no more")
        if self._last and (mishaps.folder / "killed").exists():
            mishaps.once("stepped-again")
        with (mishaps.folder / "seen.jsonl").open("a") as file:
            file.write(json.dumps([step, os.environ.get("WORLD_SIZE", "1"), *micro_batch.sequence_ids]) + "\n")
        return super().loss(model, micro_batch)

    def evaluate(self, model: nn.Module, data: TinyShards) -> Mapping[str, Any]:
        """Of the tiny task; notes which worker it was, if any."""
        note = {"rank": os.environ.get("RANK"), "priority": os.getpriority(os.PRIO_PROCESS, 0)}
        with (self.mishaps.folder / "evaluated.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        if self.mishaps.refuse_evaluating:
            raise EvaluationError("evaluation: the test wants no numbers")
        return super().evaluate(model, data)

    def export(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        """With a config, as transformers would, unless it goes wrong half-way."""
        super().export(weights, directory)
        if self.mishaps.export_fails:
            raise OSError(28, "No space left on device")
        config = {"architectures": ["TinyModel"], "model_type": "tiny"}
        (directory / "config.json").write_text(json.dumps(config))


def _die_before_commit(mishaps: Mishaps) -> None:
    from train_jobs.trainer import committed

    digest = committed.digest_files

    def digest_or_die(directory: Path, names: Any) -> Any:
        if mishaps.once("killed-saving"):
            os.kill(os.getpid(), signal.SIGKILL)
        return digest(directory, names)

    committed.digest_files = digest_or_die


def gather(mishaps: Mishaps) -> Materials:
    """What the run's workers get."""
    torch.manual_seed(0)
    return Materials(task=MishapTask(mishaps), shards=TinyShards(), evaluation_data=TinyShards(8, seed=1))


def tiny_run(
    folder: Path, run_id: str, *, workers: tuple[int, int] = (2, 2), steps: int = 20, **changes: Any
) -> RunSpec:
    """A run of ``steps`` steps below ``folder``; fields of the spec and of Mishaps by name."""
    mishap_names = Mishaps.__dataclass_fields__.keys() & changes.keys()
    notes = folder / "notes" / run_id
    notes.mkdir(parents=True, exist_ok=True)
    mishaps = Mishaps(folder=notes, **{name: changes.pop(name) for name in mishap_names})
    spec = RunSpec(
        job="tiny",
        run_dir=folder / "runs" / "tiny" / run_id,
        data_directory=None,
        train=tiny_spec(
            strategy=Ddp(),
            # gentle, so that roundings, which depend on the number of workers, do not grow
            optimizer=Sgd(lr=0.01, weight_decay=0.0, momentum=0.9, nesterov=False),
            duration=DurationSpec(kind="steps", amount=steps),
            checkpoint=CheckpointSpec(every_steps=5, keep_last=2, keep_best=0),
        ),
        min_workers=workers[0],
        max_workers=workers[1],
        needs=WorkerNeeds(cpus=0.5, gpus=0, threads=1),
        start_timeout_s=120.0,
        step_timeout_s=60.0,
        resize_delay_s=1.0,
        max_failures=3,
        materials="tests.support.tiny_run:gather",
        arguments=mishaps,
        settings={"task": "tiny"},
        code_digest=code_digest(),
    )
    return replace(spec, **changes)


def seen(folder: Path, run_id: str) -> dict[int, set[int]]:
    """Ids of the sequences of each step, over all workers and attempts."""
    found: dict[int, set[int]] = {}
    for line in (folder / "notes" / run_id / "seen.jsonl").read_text().splitlines():
        step, _, *ids = json.loads(line)
        found.setdefault(step, set()).update(ids)
    return found
