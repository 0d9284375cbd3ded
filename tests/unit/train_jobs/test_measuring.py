"""Evaluations apart from the workers: the same numbers, each checkpoint once, and training never far ahead."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config.jobs_train import JobTask
from tests.support.tiny_run import tiny_run
from tests.support.tiny_task import EVALUATION, TinyShards, TinyTask, tiny_spec
from tests.support.tiny_tasks import LORA, open_task, save_base, task_spec, write_task_data
from train_jobs.run_spec import RunSpec
from train_jobs.supervision.measuring import NICENESS, measure, measure_beside
from train_jobs.supervision.worker import train_here
from train_jobs.tasks.spec import AdapterSpec
from train_jobs.trainer import committed
from train_jobs.trainer.errors import CheckpointError, TrainingError
from train_jobs.trainer.hooks import NoHooks, TrainResult, as_evaluated
from train_jobs.trainer.loop import Trainer
from train_jobs.trainer.materials import Materials
from train_jobs.trainer.spec import BatchSpec, CheckpointSpec, DurationSpec, TrainSpec
from train_jobs.trainer.world import World

OFTEN = replace(EVALUATION, every_steps=2)
KEPT = CheckpointSpec(every_steps=100, keep_last=9, keep_best=1)
SHORT = {"duration": DurationSpec(kind="steps", amount=8), "evaluation": OFTEN, "checkpoint": KEPT}


def train(run_dir: Path, spec: TrainSpec, materials: Materials, hooks: NoHooks, *, evaluates: bool) -> TrainResult:
    return Trainer(
        spec=spec,
        task=materials.task,
        shards=materials.shards,
        evaluation_data=materials.evaluation_data,
        run_dir=run_dir,
        world=World.current(),
        hooks=hooks,
        evaluates=evaluates,
    ).run()


def scores(root: Path) -> dict[int, committed.Evaluation | None]:
    steps = committed.committed_steps(root)
    return {step: committed.read_evaluation(committed.checkpoint_directory(root, step)) for step in steps}


@pytest.mark.parametrize(
    ("task", "adapter", "changes"),
    [
        ("lm", None, {"ema": 0.5}),
        ("sft", None, {"precision": "bfloat16"}),
        ("classify", None, {}),
        ("dpo", LORA, {}),
    ],
)
def test_a_checkpoint_gives_the_numbers_that_its_workers_had(
    task: JobTask, adapter: AdapterSpec | None, changes: dict[str, object], tmp_path: Path
) -> None:
    write_task_data(tmp_path / "data", task)
    base = save_base(tmp_path / "base", "bert" if task == "classify" else "llama")
    opened = open_task(task_spec(task, base, adapter=adapter), tmp_path / "data")
    materials = Materials(task=opened[0], shards=opened[1], evaluation_data=opened[2])
    batch = BatchSpec(sequences=8, micro_sequences=4)
    run = tiny_run(tmp_path, "run")
    run = replace(run, train=tiny_spec(batch=batch, **SHORT, **changes))
    result = train(run.run_dir, run.train, materials, NoHooks(), evaluates=True)
    found = scores(run.checkpoints)
    assert list(found) == [2, 4, 6, 8]
    for step, evaluation in found.items():
        assert evaluation is not None
        assert measure(run, materials, committed.checkpoint_directory(run.checkpoints, step)) == evaluation.metrics
    assert result.metrics == found[8].metrics  # type: ignore[union-attr]


class Elsewhere(NoHooks):
    """Evaluates the oldest checkpoint that waits, whenever the training waits for that."""

    def __init__(self, run: RunSpec) -> None:
        self.run = run
        self.waited: list[list[int]] = []

    def waiting(self) -> None:
        awaiting = committed.awaiting_evaluation(self.run.checkpoints)
        self.waited.append(awaiting)
        self.evaluate(awaiting[0])

    def evaluate(self, step: int) -> None:
        directory = committed.checkpoint_directory(self.run.checkpoints, step)
        committed.write_evaluation(directory, measure_beside(self.run, directory))


def test_training_waits_for_evaluations_that_lag_behind_and_keeps_what_they_need(tmp_path: Path) -> None:
    keep_one = replace(KEPT, keep_last=1)
    spec = tiny_spec(**SHORT | {"checkpoint": keep_one})
    materials = Materials(task=TinyTask(), shards=TinyShards(), evaluation_data=TinyShards(8, seed=1))
    here = train(tmp_path / "here", spec, materials, NoHooks(), evaluates=True)
    run = replace(tiny_run(tmp_path, "beside"), train=spec)
    elsewhere = Elsewhere(run)
    beside = train(run.run_dir, spec, materials, elsewhere, evaluates=False)
    assert elsewhere.waited == [[2, 4], [4, 6]]
    assert (beside.metrics, committed.awaiting_evaluation(run.checkpoints)) == ({}, [6, 8])
    for step in (6, 8):
        elsewhere.evaluate(step)
    committed.retain(run.checkpoints, keep_last=1, keep_best=1, mode="min")
    done = as_evaluated(beside, spec)
    assert done.metrics == here.metrics
    assert done.best_checkpoint is not None
    assert here.best_checkpoint is not None
    assert done.best_checkpoint.name == here.best_checkpoint.name
    assert scores(run.checkpoints) == scores(tmp_path / "here" / "checkpoints")
    assert not (run.run_dir / "evaluations.jsonl").exists()  # whoever evaluates writes it


def test_a_measuring_thread_is_nice_and_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "nice", steps=5)
    run = replace(run, train=replace(run.train, evaluation=EVALUATION))
    checkpoint = train_here(run, World.current(), NoHooks()).checkpoint
    before = os.getpriority(os.PRIO_PROCESS, 0)
    evaluation = measure_beside(run, checkpoint)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    assert evaluation == committed.read_evaluation(checkpoint)
    lines = [json.loads(line) for line in (tmp_path / "notes" / "nice" / "evaluated.jsonl").read_text().splitlines()]
    assert [line["priority"] for line in lines] == [before, min(before + NICENESS, 19)]
    with pytest.raises(TrainingError, match="the evaluation gives no f1; it gives loss"):
        measure_beside(
            replace(run, train=replace(run.train, evaluation=replace(EVALUATION, metric="f1"))), checkpoint
        )
    (checkpoint / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot be evaluated: .*__0_0.distcp has 0 bytes"):
        measure_beside(run, checkpoint)


def test_the_best_is_the_one_with_the_best_score_and_of_equal_ones_the_first(tmp_path: Path) -> None:
    materials = Materials(task=TinyTask(), shards=TinyShards(), evaluation_data=TinyShards(8, seed=1))
    train(tmp_path, tiny_spec(**SHORT), materials, NoHooks(), evaluates=True)
    root = tmp_path / "checkpoints"
    for step, score in zip((2, 4, 6, 8), (3.0, 1.0, 1.0, None), strict=True):
        directory = committed.checkpoint_directory(root, step)
        committed.write_evaluation(directory, committed.Evaluation(metrics={}, score=score))
    assert committed.best_steps(root, "min") == [4, 6, 2]
    assert committed.best_steps(root, "max") == [2, 4, 6]
    (committed.checkpoint_directory(root, 4) / "evaluation.json").write_text("{")
    assert committed.awaiting_evaluation(root) == [4]
    assert committed.retain(root, keep_last=1, keep_best=1, mode="min") == [4, 6, 8]
