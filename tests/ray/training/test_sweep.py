"""A sweep on a real Ray: the best trial finishes, a bad one ends early, one that fails does not stop the others."""

from functools import partial
from pathlib import Path

import pytest

from cluster.runs.files import STATE
from cluster.runs.state import read_state
from cluster.runs.sweep import Sweep, read_sweep
from tests.support.tiny_sweep import STEPS, make_run
from train_jobs.job import SpaceSpec, StopSpec, TuneSpec
from train_jobs.trainer import committed
from train_jobs.tuning.sweep import run_sweep

pytestmark = pytest.mark.ray

RATES = [0.05, 1e-6, 0.0]
SPEC = TuneSpec(
    name="sweep",
    job="tiny",
    search="grid",
    trials=None,
    space={"optimizer.lr": SpaceSpec(kind="choice", values=RATES)},
    metric="loss",
    mode="min",
    stop=StopSpec(grace_steps=5, keep_one_of=2),
    concurrent=1,
    seed=0,
)


@pytest.mark.usefixtures("raylets")
def test_a_sweep_keeps_its_best_trial_and_goes_on_where_it_was(tmp_path: Path) -> None:
    seen: list[Sweep] = []
    table = run_sweep(SPEC, partial(make_run, tmp_path), tmp_path / "sweep", seen.append)
    assert table.close().values == {"optimizer.lr": 0.05}
    good, slow, failing = table.sweep.trials
    assert (good.status, good.step) == ("finished", STEPS)
    assert (slow.status, slow.step) == ("ended early", 5)
    assert failing.status == "failed"
    assert failing.error == "step 2: the test wants no more"
    assert read_sweep(tmp_path / "sweep") == table.sweep == seen[-1]
    stopped = tmp_path / "runs" / "tiny" / str(slow.run_id)
    assert read_state(stopped).status == "stopped"
    step = committed.newest_step(stopped / "checkpoints")
    assert step is not None
    assert 5 <= step < STEPS

    before = (tmp_path / "runs" / "tiny" / str(good.run_id) / STATE).stat().st_mtime_ns
    again = run_sweep(SPEC, partial(make_run, tmp_path), tmp_path / "sweep", seen.append)
    assert again.close().score == good.score
    assert [trial.status for trial in again.sweep.trials] == ["finished", "ended early", "failed"]
    assert (tmp_path / "runs" / "tiny" / str(good.run_id) / STATE).stat().st_mtime_ns == before
