"""The loop in one process: it learns, resumes exactly, survives damage, and refuses what cannot be."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.errors import PlanError
from cluster.runs.log import StepReport
from tests.support.tiny_task import EVALUATION, TinyShards, TinyTask, tiny_spec
from train_jobs.trainer import committed
from train_jobs.trainer.errors import CheckpointError, TrainingError
from train_jobs.trainer.hooks import NoHooks, TrainResult
from train_jobs.trainer.loop import Trainer
from train_jobs.trainer.spec import (
    Adam,
    BatchSpec,
    CheckpointSpec,
    Ddp,
    DurationSpec,
    EvaluationSpec,
    Fsdp,
    Hsdp,
    ParameterServer,
    Pipeline,
    ScheduleSpec,
    Sgd,
    TrainSpec,
)
from train_jobs.trainer.state import load_tensors, saved_tensors, trained_weights
from train_jobs.trainer.strategies.choosing import check_fits, spread
from train_jobs.trainer.world import World

CONSTANT = ScheduleSpec(kind="constant", warmup_steps=0, final_fraction=None, decay_steps=None)
SHORT = {
    "duration": DurationSpec(kind="steps", amount=6),
    "checkpoint": CheckpointSpec(every_steps=2, keep_last=2, keep_best=0),
}


class Recorder(NoHooks):
    """Keeps what it is told; ``stop_at`` asks to stop in that step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.step = -1
        self.reports: list[StepReport] = []
        self.checkpoints: list[str] = []

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.reports]

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_checkpoint(self, path: Path) -> None:
        assert (path / committed.COMMITTED).is_file()
        self.checkpoints.append(path.name)

    def heartbeat(self, step: int) -> None:
        self.step = step

    def should_stop(self) -> Any:
        return "checkpoint_and_stop" if self.step == self.stop_at else "no"


def train(
    run_dir: Path, spec: TrainSpec, *, task: Any = None, hooks: NoHooks | None = None, shards: Any = None
) -> TrainResult:
    return Trainer(
        spec=spec,
        task=task or TinyTask(),
        shards=shards or TinyShards(),
        evaluation_data=TinyShards(8, seed=1),
        run_dir=run_dir,
        world=World.current(),
        hooks=hooks or NoHooks(),
    ).run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """A short run that nobody changes, and its result."""
    run_dir = tmp_path_factory.mktemp("finished")
    return run_dir, train(run_dir, tiny_spec(**SHORT))


@pytest.fixture
def run_dir(finished: tuple[Path, TrainResult], tmp_path: Path) -> Path:
    """The finished short run, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "run")


def everything(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in saved_tensors(directory).items()}
    load_tensors(tensors, directory)
    return tensors


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_learns_and_leaves_a_directory(tmp_path: Path) -> None:
    recorder = Recorder()
    evaluation = EvaluationSpec(every_steps=10, metric="loss", mode="min")
    result = train(tmp_path, tiny_spec(evaluation=evaluation), hooks=recorder)
    assert (result.outcome, result.step, result.resumed_from, result.damaged) == ("finished", 20, None, ())
    assert result.loss == recorder.losses[-1] < recorder.losses[0]
    assert set(recorder.checkpoints) == {"step-5", "step-10", "step-15", "step-20"}
    assert committed.committed_steps(tmp_path / "checkpoints") == [15, 20]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    evaluations = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [10, 20]
    assert evaluations[-1]["evaluation"] == result.metrics
    assert list((tmp_path / "tensorboard").iterdir())
    report = recorder.reports[-1]
    assert 0 < report.padding_ratio < 0.5
    assert report.num_targets < report.num_tokens
    assert report.tokens_per_s == pytest.approx(report.num_tokens / report.step_s)
    assert report.mfu > 0
    assert report.memory_bytes > 1 << 20


def test_loss_is_the_mean_over_targets_however_the_batch_is_cut(tmp_path: Path) -> None:
    losses = []
    for micro_sequences in (1, 4, 16):
        recorder = Recorder()
        batch = BatchSpec(sequences=16, micro_sequences=micro_sequences)
        train(tmp_path / str(micro_sequences), tiny_spec(batch=batch, **SHORT), hooks=recorder)
        losses.append(recorder.losses)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5, abs=0)
    assert losses[1] == pytest.approx(losses[2], rel=1e-5, abs=0)


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    losses = []
    for recompute in (False, True):
        recorder = Recorder()
        spec = tiny_spec(activation_checkpointing=recompute, **SHORT)
        train(tmp_path / str(recompute), spec, hooks=recorder, task=TinyTask(dropout=0.2))
        losses.append(recorder.losses)
    assert losses[0] == losses[1]


def test_stopped_run_continues_bit_for_bit(tmp_path: Path) -> None:
    spec = tiny_spec(ema=0.9, **SHORT)
    calm = train(tmp_path / "calm", spec, task=TinyTask(dropout=0.1))
    stopped = train(tmp_path / "run", spec, task=TinyTask(dropout=0.1), hooks=Recorder(stop_at=2))
    assert (stopped.outcome, stopped.step) == ("stopped", 3)
    resumed = train(tmp_path / "run", spec, task=TinyTask(dropout=0.1))
    assert (resumed.outcome, resumed.step, resumed.resumed_from) == ("finished", 6, 3)
    one, other = everything(calm.checkpoint), everything(resumed.checkpoint)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert resumed.loss == calm.loss


def test_finished_run_does_nothing_more(tmp_path: Path) -> None:
    spec = tiny_spec(evaluation=EVALUATION, **SHORT)
    first = train(tmp_path, spec)
    recorder = Recorder()
    again = train(tmp_path, spec, hooks=recorder)
    assert recorder.reports == []
    assert (again.outcome, again.step, again.loss, again.metrics) == ("finished", 6, None, first.metrics)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.json", "digests.json"])
def test_damaged_checkpoint_falls_back_to_the_one_before(
    run_dir: Path, finished: tuple[Path, TrainResult], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(run_dir / "checkpoints" / "step-6" / name)
    again = train(run_dir, tiny_spec(**SHORT))
    assert (again.resumed_from, again.step) == (4, 6)
    assert again.loss == finished[1].loss
    assert name in again.damaged[0]
    assert "falling back to the one before" in caplog.text
    assert (run_dir / "checkpoints" / "step-6.damaged-0").is_dir()


def test_all_checkpoints_damaged_is_an_error_not_a_new_start(run_dir: Path) -> None:
    for step in (4, 6):
        (run_dir / "checkpoints" / f"step-{step}" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        train(run_dir, tiny_spec(**SHORT))


def test_checkpoint_without_its_commit_does_not_exist(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step-6" / committed.COMMITTED).unlink()
    again = train(run_dir, tiny_spec(**SHORT))
    assert (again.resumed_from, again.damaged) == (4, ())


def test_full_disk_is_an_error_that_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(**SHORT)
    train(tmp_path, spec, hooks=Recorder(stop_at=3))
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 30, 1000))
        with pytest.raises(
            CheckpointError, match=r"No space left.*1000 bytes free.*those before are intact.*free some"
        ):
            train(tmp_path, spec)
    assert committed.committed_steps(tmp_path / "checkpoints") == [2, 4]
    assert not (tmp_path / "checkpoints" / "step-6").exists()
    assert train(tmp_path, spec).resumed_from == 4


def test_failed_commit_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_spec(**SHORT)

    def no_space(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(committed, "write_durably", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        train(tmp_path, spec)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_best_checkpoints_are_kept(tmp_path: Path) -> None:
    class Scores(TinyTask):
        """The evaluation after 4 steps is the best one."""

        scores = iter([3.0, 1.0, 2.0, 2.0])

        def evaluate(self, model: Any, data: Any) -> dict[str, float]:
            return {"loss": next(self.scores)}

    checkpoint = CheckpointSpec(every_steps=100, keep_last=1, keep_best=1)
    duration = DurationSpec(kind="steps", amount=8)
    evaluation = EvaluationSpec(every_steps=2, metric="loss", mode="min")
    spec = tiny_spec(checkpoint=checkpoint, duration=duration, evaluation=evaluation)
    result = train(tmp_path, spec, task=Scores())
    assert committed.committed_steps(tmp_path / "checkpoints") == [4, 8]
    assert result.best_checkpoint == tmp_path / "checkpoints" / "step-4"
    assert result.metrics == {"loss": 2.0}


def test_another_spec_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    train(tmp_path, tiny_spec(**SHORT), hooks=Recorder(stop_at=1))
    with pytest.raises(CheckpointError, match="seed was 7 and is 8"):
        train(tmp_path, tiny_spec(seed=8, **SHORT))
    changed = tiny_spec(strategy=Ddp(), batch=BatchSpec(sequences=16, micro_sequences=8), **SHORT)
    assert train(tmp_path, changed).resumed_from == 2


def test_frozen_parameters_are_neither_trained_nor_saved(tmp_path: Path) -> None:
    result = train(tmp_path, tiny_spec(**SHORT), task=TinyTask(frozen="layers"))
    weights = trained_weights(result.checkpoint, averaged=False)
    assert set(weights) == {"embed.weight", "head.weight", "head.bias"}


def test_average_is_the_exponential_one(tmp_path: Path) -> None:
    spec = tiny_spec(ema=0.75, **SHORT | {"checkpoint": CheckpointSpec(every_steps=1, keep_last=9, keep_best=0)})
    result = train(tmp_path, spec)
    expected = dict(TinyTask().build_model(spec).named_parameters())
    expected = {name: weight.detach().clone() for name, weight in expected.items()}
    for step in range(1, 7):
        weights = trained_weights(result.checkpoint.with_name(f"step-{step}"), averaged=False)
        expected = {name: 0.75 * before + 0.25 * weights[name] for name, before in expected.items()}
    averages = trained_weights(result.checkpoint, averaged=True)
    torch.testing.assert_close(averages, expected)


def test_bfloat16_keeps_float32_weights(tmp_path: Path) -> None:
    full, half = Recorder(), Recorder()
    train(tmp_path / "full", tiny_spec(**SHORT), hooks=full)
    result = train(tmp_path / "half", tiny_spec(precision="bfloat16", **SHORT), hooks=half)
    assert {tensor.dtype for tensor in everything(result.checkpoint).values()} == {torch.float32}
    assert half.losses != full.losses
    assert half.losses == pytest.approx(full.losses, rel=0.02)


def test_gradient_norm_is_clipped(tmp_path: Path) -> None:
    moved = []
    for clip_norm in (None, 0.01):
        optimizer = Sgd(lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
        duration = DurationSpec(kind="steps", amount=1)
        spec = tiny_spec(clip_norm=clip_norm, optimizer=optimizer, schedule=CONSTANT, duration=duration)
        recorder = Recorder()
        result = train(tmp_path / str(clip_norm), spec, hooks=recorder)
        after = trained_weights(result.checkpoint, averaged=False)
        before = dict(TinyTask().build_model(spec).named_parameters())
        steps = torch.cat([(after[name] - before[name]).detach().flatten() for name in after])
        moved.append((float(steps.norm()), recorder.reports[0].grad_norm))
    assert moved[0][0] == pytest.approx(moved[0][1], rel=1e-4)
    assert moved[1][0] == pytest.approx(0.01, rel=1e-3)
    assert moved[1][1] == moved[0][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": EvaluationSpec(every_steps=None, metric="f1", mode="max")}, "gives no f1; it gives loss"),
        ({"optimizer": Sgd(lr=1e30, weight_decay=0.0, momentum=0.0, nesterov=False)}, "lower optimizer.lr"),
    ],
)
def test_training_that_cannot_go_on_says_why(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        train(tmp_path, tiny_spec(**SHORT | {"schedule": CONSTANT} | changes))


def test_batch_without_targets_is_an_error(tmp_path: Path) -> None:
    shards = TinyShards()
    shards._segments[:] = 0
    with pytest.raises(TrainingError, match="step 0: none of its sequences has a target"):
        train(tmp_path, tiny_spec(**SHORT), shards=shards)


class Uncut:
    """A task that does not say how to cut its model."""

    build_model = loss = evaluate = export = None


TWO_STAGES = Pipeline(schedule="1f1b", data_parallel=1, stages_per_worker=1)


@pytest.mark.parametrize(
    ("strategy", "batch", "num_workers", "task", "message"),
    [
        (tiny_spec().strategy, (16, 4), 2, TinyTask(), "strategy single: 2 workers; allowed: 1"),
        (Ddp(), (16, 3), 1, TinyTask(), "16 sequences are not a multiple of 3"),
        (Ddp(), (24, 4), 4, TinyTask(), "6 micro-batches of 4 .* by 4 workers; allowed: 1, 2, 3, 6"),
        (Hsdp(shard_workers=3), (16, 4), 4, TinyTask(), "4 workers do not form groups of 3"),
        (
            ParameterServer(max_staleness=None),
            (16, 4),
            1,
            TinyTask(),
            "parameter_server: 1 worker; allowed: 2 or more",
        ),
        (TWO_STAGES, (16, 4), 1, TinyTask(), "1 worker per pipeline; allowed: 2 or more"),
        (TWO_STAGES, (16, 4), 2, Uncut(), "Uncut does not say how its model is cut"),
        (TWO_STAGES, (16, 16), 2, TinyTask(), "1 micro-batches per step for 2 workers"),
        (
            Pipeline(schedule="1f1b", data_parallel=3, stages_per_worker=1),
            (16, 4),
            4,
            TinyTask(),
            "do not form 3 pipe",
        ),
        (
            Pipeline(schedule="1f1b", data_parallel=1, stages_per_worker=2),
            (16, 4),
            2,
            TinyTask(),
            "allowed: 1 with 1f1b",
        ),
        (
            Pipeline(schedule="interleaved", data_parallel=1, stages_per_worker=2),
            (12, 4),
            2,
            TinyTask(),
            "interleaved needs a multiple of 2 micro-batches per step, not 3",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(
    strategy: Any, batch: tuple[int, int], num_workers: int, task: Any, message: str
) -> None:
    sizes = BatchSpec(sequences=batch[0], micro_sequences=batch[1])
    with pytest.raises(PlanError, match=message):
        check_fits(tiny_spec(strategy=strategy, batch=sizes), task, num_workers)


def test_running_statistics_do_not_reach_a_parameter_server() -> None:
    class Counting(TinyTask):
        def build_model(self, spec: TrainSpec) -> nn.Module:
            return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    spec = tiny_spec(strategy=ParameterServer(max_staleness=0))
    world = World(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(PlanError, match=r"parameter_server: 1 keeps running statistics.*choose ddp"):
        spread(spec, Counting(), world, range(6))


def test_8_bit_states_are_not_cut() -> None:
    optimizer = Adam(kind="adamw8bit", lr=1e-3, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    with pytest.raises(PlanError, match=r"adamw8bit with strategy fsdp.*choose adamw, or ddp"):
        check_fits(tiny_spec(strategy=Fsdp(), optimizer=optimizer), TinyTask(), 2)


def test_schedule_longer_than_the_run_is_refused(tmp_path: Path) -> None:
    schedule = ScheduleSpec(kind="linear", warmup_steps=7, final_fraction=0.0, decay_steps=None)
    with pytest.raises(PlanError, match="7 warm-up and 0 decay steps; limit: 6"):
        train(tmp_path, tiny_spec(schedule=schedule, **SHORT))
