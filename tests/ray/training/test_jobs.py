"""Jobs on a real cluster, driven by the command line: submitted, followed, listed, continued, stopped, published."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.registry.store import Registry
from cluster.runs.files import run_directories
from cluster.runs.state import read_state
from tests.support.running import Cluster, write_cluster
from tests.support.tiny_tasks import ARCHITECTURE, save_base

pytestmark = pytest.mark.ray


def train_job(name: str, steps: int, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "train",
        "task": "lm",
        "base": {"architecture": ARCHITECTURE},
        "data": "days",
        "batch": {"sequences": 4, "micro_sequences": 4},
        "duration": {"steps": steps},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "checkpoint": {"every_steps": 50},
        "resources": {"cpus": 0.5},
    } | changes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Without a model: what trains first has nothing to serve."""
    directory = tmp_path_factory.mktemp("jobs")
    save_base(directory / "llama")
    rows = directory / "rows"
    rows.mkdir()
    (rows / "days.txt").write_text("\n".join(f"Day {number} of the year, calm and bright." for number in range(300)))
    cluster = write_cluster(directory, "jobs", [])
    prepare = {
        "name": "days",
        "kind": "prepare",
        "task": "lm",
        "inputs": [{"source": f"path://{rows}", "format": "lines"}],
        "tokenizer": f"path://{directory / 'llama'}",
        "sequence_tokens": 32,
        "workers": 2,
    }

    def with_jobs(values: dict[str, Any]) -> None:
        values["cluster"]["nodes"][0]["resources"] = {"CPU": 4, "train_slot": 2}
        del values["models"]
        values["jobs"] = [
            prepare,
            train_job("forecast", 20, publish={"model": "forecaster", "require": {"loss": 100.0}}),
            train_job("endless", 1_000_000, evaluate=None),
        ]

    cluster.edit(with_jobs)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def rows_of(cluster: Cluster) -> dict[str, dict[str, Any]]:
    done = cluster.manta("jobs", str(cluster.config), "--json")
    assert done.returncode == 0, done.stderr
    return {row["job"]: row for row in json.loads(done.stdout)}


def test_data_are_prepared_by_actors_of_the_cluster(cluster: Cluster) -> None:
    done = cluster.manta("train", str(cluster.config), "days", "--follow")
    assert done.returncode == 0, done.stderr
    assert "Submitted days as manta-jobs-days-1." in done.stderr
    assert "Data days  task lm" in done.stderr
    assert done.stderr.splitlines()[-1] == "days is done."
    [manifest] = cluster.storage.glob("data/days/*/manifest.json")
    assert json.loads(manifest.read_text())["splits"]["train"]["num_sequences"] > 50
    row = rows_of(cluster)["days"]
    assert (row["state"], row["submission"]) == ("succeeded", "manta-jobs-days-1")


def test_a_model_is_trained_on_them_and_published(cluster: Cluster) -> None:
    looked = cluster.manta("train", str(cluster.config), "forecast", "--dry-run", "--json")
    assert looked.returncode == 0, looked.stderr
    planned = json.loads(looked.stdout)
    done = cluster.manta("train", str(cluster.config), "forecast", "--follow")
    assert done.returncode == 0, done.stderr
    assert "step 20 of 20, loss " in done.stderr
    version = Registry(str(cluster.storage)).resolve("forecaster@latest")
    assert version.lineage.job == "forecast"
    assert version.lineage.data_digest == planned["data_digest"]
    assert version.metrics["loss"] < 100
    assert Path(planned["run_directory"]).is_dir()
    row = rows_of(cluster)["forecast"]
    assert (row["state"], row["step"], row["num_steps"], row["published"]) == ("succeeded", 20, 20, "forecaster@v1")


def test_a_job_that_is_stopped_saves_and_goes_on_when_submitted_again(cluster: Cluster) -> None:
    config = str(cluster.config)
    assert cluster.manta("train", config, "endless").returncode == 0
    again = cluster.manta("train", config, "endless")
    assert again.returncode == 1
    assert "already, as manta-jobs-endless-1" in again.stderr
    await_step(cluster, "endless", 1)
    stopped = cluster.manta("stop", config, "endless", "--json")
    assert stopped.returncode == 0, stopped.stderr
    assert json.loads(stopped.stdout)["state"] == "STOPPED"
    reached = step_of(cluster, "endless")
    assert reached >= 1
    follower = subprocess.Popen(
        [sys.executable, "-m", "cluster", "train", config, "endless", "--follow"], stderr=subprocess.PIPE, text=True
    )
    await_step(cluster, "endless", reached + 1)
    assert cluster.manta("stop", config, "endless").returncode == 0
    _, said = follower.communicate(timeout=60)
    assert f"from step {reached}" in said
    assert said.splitlines()[-1] == "endless was stopped; submit it again to continue it."


def step_of(cluster: Cluster, job: str) -> int:
    directories = run_directories(cluster.storage, job)
    return read_state(directories[0]).step if directories else 0


def await_step(cluster: Cluster, job: str, step: int) -> None:
    deadline = time.monotonic() + 200
    while step_of(cluster, job) < step:
        assert time.monotonic() < deadline, step_of(cluster, job)
        time.sleep(0.2)
