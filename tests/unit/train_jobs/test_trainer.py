"""The loop in one process: it learns, resumes exactly, survives damage, and refuses what cannot be."""

from pathlib import Path

from tests.support.tiny_task import EVALUATION, TinyShards, TinyTask, tiny_spec
from train_jobs.trainer.hooks import NoHooks, TrainResult
from train_jobs.trainer.loop import Trainer
from train_jobs.trainer.spec import TrainSpec
from train_jobs.trainer.world import World


def train(
    run_dir: Path, spec: TrainSpec, *, task: TinyTask | None = None, hooks: NoHooks | None = None
) -> TrainResult:
    return Trainer(
        spec=spec,
        task=task or TinyTask(),
        shards=TinyShards(),
        evaluation_data=TinyShards(8, seed=1),
        run_dir=run_dir,
        world=World.current(),
        hooks=hooks or NoHooks(),
    ).run()


def test_loss_falls(tmp_path: Path) -> None:
    result = train(tmp_path, tiny_spec(evaluation=EVALUATION))
    assert result.outcome == "finished"
    assert result.step == 20
    assert result.loss is not None
    assert result.loss < 4.0
