"""What keeps a run alive, decided without Ray: who is stuck, how many fit, when to resize, when to give up."""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest

from cluster.errors import PlanError
from cluster.runs.state import read_state
from tests.support.run_directories import step_report
from tests.support.tiny_run import tiny_run
from tests.support.tiny_task import EVALUATION
from train_jobs.kinds.train import ProgressLines
from train_jobs.run_spec import allowed_sizes
from train_jobs.supervision.messages import Beat, Place
from train_jobs.supervision.monitor import Monitor
from train_jobs.supervision.resizing import Resizing
from train_jobs.supervision.restarts import Restarts
from train_jobs.supervision.room import count_places, describe_shortage, free_again, largest, quietest
from train_jobs.supervision.stacks import dump_and_end
from train_jobs.supervision.watchdog import Watch
from train_jobs.trainer.materials import gather
from train_jobs.trainer.spec import ParameterServer, Pipeline

NEEDS = {"CPU": 0.5, "train_slot": 1.0}


class Clock:
    """Stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def monitored(folder: Path, run_id: str, clock: Clock, **changes: float) -> tuple[Monitor, Path]:
    run_dir = folder / "runs" / "tiny" / run_id
    before = read_state(run_dir) if run_dir.exists() else None
    run_dir.mkdir(parents=True, exist_ok=True)
    return Monitor(tiny_run(folder, run_id, **changes), before, clock), run_dir


def test_watch_names_the_worker_that_is_behind_first() -> None:
    watch = Watch(3, start_timeout_s=100.0, step_timeout_s=10.0, now=0.0)
    for rank in range(3):
        watch.heard(rank, "stepping", 7, now=50.0)
    for rank in (0, 2):
        watch.heard(rank, "stepping", 8, now=51.0)
        watch.heard(rank, "stepping", 8, now=59.0)  # says the same again: no sign of life
    assert watch.stuck(now=60.0) == ()
    stuck = watch.stuck(now=60.5)
    assert [one.rank for one in stuck] == [1, 0, 2]
    assert str(stuck[0]) == "worker 1 stands still in step 7 for 10 s"


def test_watch_gives_starting_workers_longer_and_idle_ones_for_ever() -> None:
    watch = Watch(2, start_timeout_s=100.0, step_timeout_s=10.0, now=0.0)
    watch.heard(0, "stepping", 0, now=95.0)
    assert watch.stuck(now=100.0) == ()
    assert [str(one) for one in watch.stuck(now=101.0)] == [
        "worker 1 stands still starting for 101 s",
        "worker 0 stands still in step 0 for 6 s",
    ]
    for rank in range(2):
        watch.heard(rank, "paused", 5, now=101.0)
    assert watch.all_in("paused")
    assert watch.stuck(now=1e6) == ()


def test_a_worker_that_waits_for_work_is_not_stuck_but_the_one_it_waits_for_is() -> None:
    watch = Watch(3, start_timeout_s=100.0, step_timeout_s=5.0, now=0.0)
    watch.heard(0, "stepping", 7, now=2.0)
    watch.heard(1, "stepping", 5, now=1.0)
    watch.heard(2, "waiting", 6, now=1.0)
    assert watch.stuck(now=6.0) == ()
    assert [str(one) for one in watch.stuck(now=6.5)] == [
        "worker 1 stands still in step 5 for 6 s",
        "worker 0 stands still in step 7 for 4 s",
    ]


def test_places_are_counted_node_by_node() -> None:
    free = {"a": {"CPU": 2.0, "train_slot": 1.0}, "b": {"CPU": 0.4, "train_slot": 5.0}, "c": {"CPU": 8.0}}
    assert count_places(NEEDS, free) == 1
    assert count_places({"CPU": 0.1}, {"a": {"CPU": 0.30000000000000004 - 0.1 + 0.1}}) == 3
    assert largest((1, 2, 4), 3) == 2
    assert largest((2, 4), 1) is None
    assert describe_shortage(NEEDS, 2, free) == (
        "2 workers with CPU 0.5, train_slot 1 each do not fit; free on 3 nodes together: CPU 10.4, train_slot 6"
    )


def test_places_of_the_group_before_are_free_again_where_nodes_stay() -> None:
    free = {"a": {"CPU": 0.0, "train_slot": 0.0}, "b": {"CPU": 1.0, "train_slot": 1.0}}
    after = free_again(free, NEEDS, ["a", "a", "gone"], leaving=["b"])
    assert after == {"a": {"CPU": 1.0, "train_slot": 2.0}}
    assert count_places(NEEDS, after) == 2
    assert free["a"]["CPU"] == 0.0


def test_a_group_grows_only_into_room_that_stays() -> None:
    resizing = Resizing((1, 2, 4), delay_s=30.0)
    see = {"size": 1, "on_leaving_nodes": False}
    assert not resizing.should(places=2, now=0.0, **see)
    assert not resizing.should(places=1, now=20.0, **see)  # gone again
    assert not resizing.should(places=2, now=25.0, **see)
    assert not resizing.should(places=3, now=54.0, **see)
    assert resizing.should(places=4, now=55.0, **see)
    resizing.restarted()
    assert not resizing.should(size=2, places=3, on_leaving_nodes=False, now=60.0)  # 3 is no size
    assert not resizing.should(size=2, places=3, on_leaving_nodes=False, now=600.0)
    assert not resizing.should(size=4, places=1, on_leaving_nodes=False, now=601.0)  # what runs is left running
    assert resizing.should(size=4, places=1, on_leaving_nodes=True, now=602.0)


def test_failures_are_counted_since_the_last_new_checkpoint() -> None:
    restarts = Restarts(max_failures=2)
    assert [restarts.try_again(5), restarts.try_again(5), restarts.try_again(10), restarts.try_again(10)] == [
        True
    ] * 4
    assert not restarts.try_again(10)
    assert not Restarts(max_failures=0).try_again(0)


def test_sizes_are_those_that_share_the_batch(tmp_path: Path) -> None:
    spec = tiny_run(tmp_path, "sizes", workers=(1, 8))
    assert allowed_sizes(spec) == (1, 2, 4)
    with pytest.raises(PlanError, match="cannot be shared equally by 3 workers"):
        allowed_sizes(replace(spec, min_workers=3, max_workers=3))
    pipeline = replace(spec.train, strategy=Pipeline(schedule="1f1b", data_parallel=2, stages_per_worker=1))
    assert allowed_sizes(replace(spec, train=pipeline)) == (4, 6, 8)
    served = replace(spec.train, strategy=ParameterServer(max_staleness=None))
    assert allowed_sizes(replace(spec, train=served)) == (2, 3, 4, 5, 6, 7, 8)


def test_monitor_orders_a_pause_and_sees_when_all_have_saved(tmp_path: Path) -> None:
    monitor, run_dir = monitored(tmp_path, "monitored", Clock())
    monitor.wait_for("room")
    assert read_state(run_dir).waiting == "room"
    monitor.begin_attempt(2)
    assert [monitor.join(rank, Place(node_id="n", pid=rank)) for rank in range(2)] == [1, 1]
    beats = [Beat(attempt=1, rank=rank, stage="stepping", step=3) for rank in range(2)]
    assert [monitor.beat(beat) for beat in beats] == ["go", "go"]
    monitor.pause("there is room")
    assert read_state(run_dir) == monitor.state()
    assert [monitor.beat(beat) for beat in beats] == ["pause", "pause"]
    assert monitor.beat(Beat(attempt=1, rank=0, stage="paused", step=3)) == "pause"
    assert not monitor.look().all_paused
    monitor.beat(Beat(attempt=1, rank=1, stage="paused", step=3))
    assert monitor.look().all_paused
    monitor.end_attempt("resized")
    monitor.begin_attempt(1)
    assert monitor.beat(beats[1]) == "stop"  # a worker of the group before, still alive
    assert monitor.beat(replace(beats[0], attempt=2)) == "go"
    monitor.stop()
    assert monitor.look().stopping
    assert monitor.beat(replace(beats[0], attempt=2)) == "stop"
    assert [(one.num_workers, one.end) for one in read_state(run_dir).attempts] == [(2, "resized"), (1, None)]


def test_monitor_writes_progress_about_once_a_second(tmp_path: Path) -> None:
    clock = Clock()
    monitor, run_dir = monitored(tmp_path, "progress", clock)
    monitor.begin_attempt(1)
    for step in range(1, 5):
        clock.now += 0.4
        monitor.beat(
            Beat(
                attempt=1,
                rank=0,
                stage="stepping",
                step=step,
                report=msgspec.structs.replace(step_report(step, 20, random.Random(0)), loss=2.5),
            )
        )
    state = read_state(run_dir)
    assert (state.status, state.step, state.num_steps, state.loss) == ("running", 3, 20, 2.5)
    assert state.remaining_s == pytest.approx(17 * 0.4)
    again = monitored(tmp_path, "progress", clock)[0].state()  # its driver was killed
    assert (again.began, again.status, again.step) == (state.began, "running", 3)
    assert [(one.end, one.reason) for one in again.attempts] == [("failed", "ended without a word")]
    monitor.conclude(status="finished", step=20)
    assert read_state(run_dir).ended is not None


def test_monitor_names_stuck_workers(tmp_path: Path) -> None:
    clock = Clock()
    monitor, _ = monitored(tmp_path, "stuck", clock, step_timeout_s=5.0)
    monitor.begin_attempt(1)
    monitor.join(0, Place(node_id="n", pid=1))
    monitor.beat(Beat(attempt=1, rank=0, stage="stepping", step=3))
    clock.now += 5.1
    monitor.beat(Beat(attempt=1, rank=0, stage="stepping", step=3))
    assert [one.step for one in monitor.look().stuck] == [3]


def test_monitor_knows_when_checkpoints_were_looked_for_and_what_was_measured(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    spec = replace(tiny_run(tmp_path, "measured"), run_dir=run_dir)
    run_dir.mkdir()
    monitor = Monitor(replace(spec, train=replace(spec.train, evaluation=EVALUATION)), None, Clock())
    assert not monitor.look().begun
    monitor.begin_attempt(2)
    monitor.beat(Beat(attempt=1, rank=1, stage="waiting", step=0))
    assert not monitor.look().begun
    monitor.beat(Beat(attempt=1, rank=0, stage="stepping", step=0))
    assert monitor.look().begun
    said: list[str] = []
    lines = ProgressLines(said.append)
    for step, score in ((5, 2.5), (10, None)):
        monitor.evaluated(step, score)
        lines.tell(read_state(run_dir))
        lines.tell(read_state(run_dir))
    assert said[1:] == ["evaluated after step 5: loss 2.5", "evaluated after step 10: loss not a number"]


def test_the_quietest_node_has_the_most_cores_free() -> None:
    assert quietest({"a": {"CPU": 0.5}, "b": {"CPU": 1.0, "train_slot": 1.0}, "c": {}}) == "b"
    assert quietest({"a": {}, "b": {}}) == "a"
    assert quietest({}) is None


def test_materials_that_cannot_be_imported(tmp_path: Path) -> None:
    assert gather("tests.support.tiny_run:gather", tiny_run(tmp_path, "m").arguments).evaluation_data is not None
    with pytest.raises(PlanError, match="tiny_run:nothing cannot be imported on this node"):
        gather("tests.support.tiny_run:nothing", None)


def test_stacks_of_a_stuck_process_and_its_end(tmp_path: Path) -> None:
    code = "import time\ndef stuck_here():\n print('in', flush=True)\n time.sleep(600)\nstuck_here()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (path,) = dump_and_end({"worker-0": process.pid}, tmp_path / "stacks")
        assert process.wait() == -9
    assert "stuck_here" in path.read_text()
    assert not psutil.pid_exists(process.pid)
    dump_and_end({"worker-0": process.pid}, tmp_path / "again")  # it has ended meanwhile
