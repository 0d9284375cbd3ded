"""What prepare jobs, the trainer and the publisher write of a run is what the page about it reads."""

import time
from pathlib import Path

from cluster.config.load import load_config
from cluster.plan.jobs import plan_job
from cluster.registry.progress import no_progress
from cluster.runs.page.render import render
from cluster.runs.record import read_run
from cluster.runs.state import RunState, write_state
from tests.support.train_site import Site
from train_jobs.kinds.train import run_spec
from train_jobs.resolving import look_at_data, resolve
from train_jobs.supervision.worker import train_here
from train_jobs.trainer.hooks import NoHooks
from train_jobs.trainer.world import World


def test_a_real_run_is_read_whole(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.write(duration={"steps": 4}, evaluate={"every_steps": 2})
    site.prepare()
    config = load_config(site.path)
    plan = plan_job(config, "forecast")
    spec = run_spec(config, resolve(config, plan, look_at_data(config, plan, no_progress), no_progress))
    result = train_here(spec, World.current(), NoHooks())
    now = time.time()
    state = RunState(
        run_id=spec.run_id,
        job=spec.job,
        kind="train",
        status="running",
        began=now,
        changed=now,
        data_directory=spec.data_directory,
    )
    write_state(spec.run_dir, state)
    record = read_run(spec.run_dir, tmp_path / "storage")
    assert [step.step for step in record.steps] == [1, 2, 3, 4]
    assert record.steps[-1].loss == result.loss
    assert [line.step for line in record.evaluations] == [2, 4]
    assert record.evaluation is not None
    assert record.evaluation.metrics == result.metrics
    assert record.data is not None
    assert (record.data.name, record.data.digest) == ("days", spec.train.data_digest)
    assert "path://" + str(tmp_path / "text") in render(record)
