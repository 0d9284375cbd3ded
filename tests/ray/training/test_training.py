"""Runs on a Ray of several nodes: whatever happens to workers, drivers and nodes, the result is the same."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import requests
import torch

from cluster.errors import PlanError
from cluster.registry.manifest import Lineage
from cluster.registry.store import Registry
from cluster.runs.files import EVALUATIONS
from cluster.runs.log import read_log
from cluster.runs.state import RunState, read_state
from tests.support.raylets import Raylets
from tests.support.tiny_run import seen, tiny_run
from tests.support.tiny_task import EVALUATION
from train_jobs.evaluation.errors import EvaluationError
from train_jobs.launch import Outcome, launch
from train_jobs.publish import PublishPlan, publish_run
from train_jobs.run_spec import RunSpec
from train_jobs.supervision.worker import train_here
from train_jobs.trainer import committed
from train_jobs.trainer.errors import TrainingError
from train_jobs.trainer.hooks import NoHooks
from train_jobs.trainer.spec import ParameterServer, Single
from train_jobs.trainer.state import trained_weights
from train_jobs.trainer.world import World

pytestmark = pytest.mark.ray

_PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def undisturbed(raylets: Raylets, folder: Path) -> Outcome:
    return run(evaluated(tiny_run(folder, "undisturbed")))


def run(spec: RunSpec) -> Outcome:
    return launch(spec, lambda state: None)


def evaluated(spec: RunSpec) -> RunSpec:
    """Along the way, every five steps."""
    return replace(spec, train=replace(spec.train, evaluation=EVALUATION))


def evaluations(spec: RunSpec) -> list[tuple[int, dict[str, Any]]]:
    return [(line.step, line.evaluation) for line in read_log(spec.run_dir / EVALUATIONS)[1]]


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return trained_weights(outcome.result.checkpoint, averaged=False)


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def wait_until(spec: RunSpec, holds: Callable[[RunState], bool]) -> RunState:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        state = read_state(spec.run_dir) if (spec.run_dir / "state.json").exists() else None
        if state is not None and holds(state):
            return state
        assert time.monotonic() < deadline, state
        time.sleep(0.1)


def test_lost_and_stuck_workers_leave_no_trace_in_the_result(undisturbed: Outcome, folder: Path) -> None:
    spec = tiny_run(folder, "disturbed", kill_saving=True, kill_at=12, hang_at=17, step_timeout_s=4.0)
    spec = evaluated(spec)
    outcome = run(spec)
    assert same_bits(weights(outcome), weights(undisturbed))
    state = outcome.state
    assert state.status == "finished"
    assert [one.end for one in state.attempts] == ["failed"] * 3 + ["finished"]
    # the first was killed between upload and commit: nothing of its checkpoint was to be had
    assert [one.resumed_from for one in state.attempts][:2] == [None, None]
    assert state.attempts[3].resumed_from in (10, 15)
    assert "worker 1 stands still in step 17" in str(state.attempts[2].reason)
    stacks = {path.name: path.read_text() for path in spec.stacks.rglob("worker-*.txt")}
    assert stacks.keys() == {"worker-0.txt", "worker-1.txt"}
    assert "loss (tests/support/tiny_run.py" in stacks["worker-1.txt"]
    notes = folder / "notes" / "disturbed"
    killed, stepped = (float((notes / f"{name}-time").read_text()) for name in ("killed", "stepped-again"))
    print(f"\nfrom the kill of a worker to its successor's first step: {stepped - killed:.1f} s")


def test_evaluations_run_beside_the_training(undisturbed: Outcome, folder: Path) -> None:
    """Those of the disturbed run are those of the undisturbed one, and no worker of either has computed any."""
    calm, disturbed = tiny_run(folder, "undisturbed"), tiny_run(folder, "disturbed")
    found = evaluations(calm)
    assert [step for step, _ in found] == [5, 10, 15, 20]
    assert evaluations(disturbed) == found
    assert undisturbed.result.metrics == found[-1][1]
    assert undisturbed.state.score is not None
    assert (undisturbed.state.score.step, undisturbed.state.score.score) == (20, found[-1][1]["loss"])
    for spec in (calm, disturbed):
        notes = (folder / "notes" / spec.run_id / "evaluated.jsonl").read_text().splitlines()
        assert [json.loads(note)["rank"] for note in notes] == [None] * 4
        assert committed.committed_steps(spec.checkpoints) == [15, 20]
        assert list((spec.run_dir / "tensorboard" / "evaluate").iterdir())


def test_an_evaluation_that_fails_ends_the_run_which_can_go_on(raylets: Raylets, folder: Path) -> None:
    spec = evaluated(tiny_run(folder, "unmeasured", workers=(1, 1), refuse_evaluating=True))
    with pytest.raises(EvaluationError, match="the test wants no numbers"):
        run(spec)
    state = read_state(spec.run_dir)
    assert (state.status, state.error) == ("failed", "evaluation: the test wants no numbers")
    # training does not get far ahead, and what it did is saved
    assert state.step < 20
    awaiting = committed.awaiting_evaluation(spec.checkpoints)
    assert awaiting == [5, 10, 15][: len(awaiting)] != []
    assert committed.newest_step(spec.checkpoints) == state.step
    outcome = run(replace(spec, arguments=replace(spec.arguments, refuse_evaluating=False)))
    assert outcome.state.attempts[1].resumed_from == state.step
    assert [step for step, _ in evaluations(spec)] == [5, 10, 15, 20]
    assert outcome.result.metrics == evaluations(spec)[-1][1]


def test_a_finished_run_is_evaluated_and_published(undisturbed: Outcome, folder: Path) -> None:
    spec = tiny_run(folder, "undisturbed")
    plan = PublishPlan(
        storage=str(folder),
        model="tiny",
        alias="latest",
        require={"loss": 10.0},
        modes={"loss": "min"},
        task="generate",
        adapter_of=None,
        lineage=Lineage(job="tiny", data_digest="d"),
    )
    failing = replace(spec, arguments=replace(spec.arguments, export_fails=True))
    with pytest.raises(OSError, match="No space left"):
        publish_run(failing, plan, undisturbed.result)
    assert "No space left" in read_state(spec.run_dir).notes[0]
    assert publish_run(spec, plan, undisturbed.result).version == "tiny@v1"
    state = read_state(spec.run_dir)
    assert (state.status, state.published, state.notes) == ("finished", "tiny@v1", ())
    assert Registry(str(folder)).resolve("tiny@latest").metrics["loss"] < 10.0


def test_what_a_worker_refuses_ends_the_run_at_once(raylets: Raylets, folder: Path) -> None:
    spec = tiny_run(folder, "refused", refuse_at=3)
    with pytest.raises(TrainingError, match="step 3: the test wants no more"):
        run(spec)
    state = read_state(spec.run_dir)
    assert (state.status, len(state.attempts)) == ("failed", 1)
    assert state.error == "step 3: the test wants no more"
    with pytest.raises(PlanError, match="cannot be shared equally by 3 workers"):
        run(tiny_run(folder, "three", workers=(3, 3)))


DRIVER = """
import sys, pickle, ray
from pathlib import Path
from train_jobs.launch import launch
ray.init(address=sys.argv[1], _node_ip_address="127.0.0.2", log_to_driver=False)
launch(pickle.loads(Path(sys.argv[2]).read_bytes()), lambda state: None)
"""


def start_driver(raylets: Raylets, spec: RunSpec, folder: Path) -> subprocess.Popen[bytes]:
    import pickle

    path = folder / "spec.pickle"
    path.write_bytes(pickle.dumps(spec))
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen([sys.executable, "-c", DRIVER, raylets.address, str(path)], env=environment)


def test_a_run_whose_driver_died_or_was_stopped_goes_on(raylets: Raylets, undisturbed: Outcome, folder: Path) -> None:
    spec = tiny_run(folder, "driven", step_s=0.1)
    driver = start_driver(raylets, spec, folder)
    wait_until(spec, lambda state: state.step >= 6)
    with pytest.raises(TrainingError, match="tiny/driven is under way already"):
        run(spec)
    driver.kill()
    driver.wait()
    driver = start_driver(raylets, spec, folder)
    wait_until(spec, lambda state: len(state.attempts) == 2 and state.step >= 8)
    psutil.Process(driver.pid).send_signal(signal.SIGTERM)
    assert driver.wait() == 0
    stopped = read_state(spec.run_dir)
    assert stopped.status == "stopped"
    assert committed.newest_step(spec.checkpoints) == stopped.step
    outcome = run(spec)
    assert same_bits(weights(outcome), weights(undisturbed))
    assert [one.end for one in outcome.state.attempts] == ["failed", "stopped", "finished"]
    assert outcome.state.attempts[2].resumed_from == stopped.step


class Launched(threading.Thread):
    """A run beside the test."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__()
        self.spec = spec
        self.outcome: Outcome | None = None
        self.start()

    def run(self) -> None:
        self.outcome = run(self.spec)


def hold(node: str, cpus: float) -> Any:
    """An actor that takes a node's cores, as replicas do."""

    @ray.remote(num_cpus=cpus, resources={node: 0.1})
    class Holder:
        def ready(self) -> None: ...

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    return holder


def wait_for_metrics(*patterns: str) -> None:
    """Until the nodes export a line for each of the patterns."""
    wanted, deadline = set(patterns), time.monotonic() + _PATIENCE_S
    while wanted:
        assert time.monotonic() < deadline, f"never exported: {wanted}"
        nodes = [node for node in ray.nodes() if node["Alive"]]
        urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
        exported = "".join(requests.get(url, timeout=30).text for url in urls)
        wanted = {pattern for pattern in wanted if not re.search(pattern, exported)}
        time.sleep(0.5)


def test_workers_come_and_go_and_serving_keeps_its_cores(raylets: Raylets, folder: Path) -> None:
    steps = 160
    expected = train_here(tiny_run(folder, "fixed", steps=steps), World.current(), NoHooks())
    first, second = hold("a", 1.0), hold("b", 1.0)
    idle = start_driver(raylets, tiny_run(folder, "idle"), folder)
    wait_until(tiny_run(folder, "idle"), lambda state: state.waiting is not None)
    psutil.Process(idle.pid).send_signal(signal.SIGTERM)
    assert idle.wait() == 1
    assert read_state(tiny_run(folder, "idle").run_dir).status == "stopped"
    spec = tiny_run(folder, "elastic", workers=(1, 2), steps=steps, step_s=0.1)
    launched = Launched(spec)
    waiting = wait_until(spec, lambda state: state.waiting is not None)
    assert "CPU 0.5, train_slot 1 each do not fit" in str(waiting.waiting)
    assert not waiting.attempts
    ray.kill(first)
    alone = wait_until(spec, lambda state: state.step >= 5)
    names = ("step", "loss", "grad_norm", "tokens_total", "data_wait_seconds_total")
    wait_for_metrics(*(f'ray_manta_train_{name}{{.*job="tiny"' for name in names))
    wait_until(spec, lambda state: state.changed > alone.changed + 4.0)  # resizes are considered every second
    assert [one.num_workers for one in read_state(spec.run_dir).attempts] == [1]
    ray.kill(second)
    grown = wait_until(
        spec, lambda state: len(state.attempts) == 2 and state.step > (state.attempts[1].resumed_from or 0) + 2
    )
    assert grown.attempts[1].num_workers == 2
    (leaving,) = [node["NodeID"] for node in ray.nodes() if node["Alive"] and "b" in node["Resources"]]
    raylets.drain(leaving)
    wait_until(
        spec, lambda state: len(state.attempts) == 3 and state.step > (state.attempts[2].resumed_from or 0) + 2
    )
    raylets.add_node(1, train_slot=1)
    wait_until(spec, lambda state: len(state.attempts) == 4 and state.step > (state.attempts[3].resumed_from or 0))
    (folder / "notes" / "elastic" / "hurry").touch()
    launched.join(_PATIENCE_S)
    assert launched.outcome is not None
    attempts = launched.outcome.state.attempts
    assert [one.num_workers for one in attempts] == [1, 2, 1, 2]
    assert [one.end for one in attempts] == ["resized"] * 3 + ["finished"]
    # each was saved before it ended: no step was done twice
    assert seen(folder, "elastic") == seen(folder, "fixed")
    assert launched.outcome.result.loss == pytest.approx(expected.loss, rel=1e-5)


def test_a_parameter_server_loses_a_worker_and_gets_another(raylets: Raylets, folder: Path) -> None:
    steps = 60
    alone = tiny_run(folder, "alone", workers=(1, 1), steps=steps)
    expected = train_here(replace(alone, train=replace(alone.train, strategy=Single())), World.current(), NoHooks())
    spec = tiny_run(folder, "served", workers=(2, 3), steps=steps, step_s=0.1, kill_at=7)
    spec = replace(spec, train=replace(spec.train, strategy=ParameterServer(max_staleness=0)))
    launched = Launched(spec)
    wait_until(spec, lambda state: len(state.attempts) == 2 and state.step > (state.attempts[1].resumed_from or 0))
    raylets.add_node(1, train_slot=1)
    wait_until(spec, lambda state: len(state.attempts) == 3 and state.step > (state.attempts[2].resumed_from or 0))
    (folder / "notes" / "served" / "hurry").touch()
    launched.join(_PATIENCE_S)
    assert launched.outcome is not None
    attempts = launched.outcome.state.attempts
    assert [(one.num_workers, one.end) for one in attempts] == [(2, "failed"), (2, "resized"), (3, "finished")]
    assert attempts[1].resumed_from == 5
    assert seen(folder, "served") == seen(folder, "alone")
    assert same_bits(weights(launched.outcome), trained_weights(expected.checkpoint, averaged=False))
