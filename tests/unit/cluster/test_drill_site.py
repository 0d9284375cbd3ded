"""What a drill may touch and what it counts as left over; the command line around it."""

import os

import psutil
import pytest
from rich.console import Console

from cluster.cli import main
from cluster.config.load import load_config
from cluster.control.drill.drill import comparable, with_replicas
from cluster.control.drill.idle import is_idle
from cluster.control.drill.judge import Pause, Promise
from cluster.control.drill.leftovers import extra_actors, extra_placement_groups, stray_processes
from cluster.control.drill.memory import Memory, slope
from cluster.control.drill.parts import Part, added, describe_parts, noticed_at_once, read_parts
from cluster.control.drill.phase import Result
from cluster.control.drill.site import Site
from cluster.control.drill.table import results_json, results_view
from cluster.control.observe import StageStatus
from cluster.control.ports import unused_ports
from cluster.errors import ControlError, UsageError
from tests.unit.cluster.recorded_dashboard import RecordedDashboard, recorded

YAML = """\
name: test
storage: {storage}
cluster:
  nodes:
    - {{name: box, resources: {{CPU: 2}}}}
models:
  - {{name: vectors, source: 'path:///nowhere', task: embed, pipeline: {{stages: 1}}}}
  - {{name: writer, source: 'path:///nowhere'}}
"""


@pytest.fixture
def yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(YAML.format(storage=tmp_path))
    return path


def stage(node: str | None, pid: int | None) -> StageStatus:
    return StageStatus(index=1, layers=(0, 2), node=node, pid=pid, resident_bytes=None, state="ALIVE")


@pytest.mark.parametrize(
    ("node", "pid", "reason"),
    [
        ("127.0.0.1", os.getpid(), "is left alone"),
        ("10.254.254.254", os.getpid(), "only processes of its own machine"),
        ("127.0.0.1", 2**22 - 1, "is gone"),
        (None, None, "has no process now"),
    ],
    ids=["another program", "another machine", "gone", "none"],  # a process id would differ between workers
)
def test_nothing_is_hurt_but_a_stage_of_this_machine(yaml, node, pid, reason) -> None:
    with pytest.raises(ControlError, match=reason):
        Site(load_config(yaml), None).stage_process(stage(node, pid))


def test_a_process_that_bears_the_name_of_a_stage_is_one(yaml) -> None:
    import subprocess
    import sys

    sleeper = (
        "import time, ray._raylet as r; r.setproctitle('ray::StageActor.serve'); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", sleeper], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            found = Site(load_config(yaml), "writer").stage_process(stage("127.0.0.1", child.pid))
            assert found.pid == child.pid
            assert stray_processes([found], []) == [f"process {child.pid} (ray::StageActor.serve) without an actor"]
            assert stray_processes([found], [{"pid": child.pid, "state": "ALIVE"}]) == []
            assert stray_processes([psutil.Process()], []) == []
        finally:
            child.kill()


def test_the_first_model_that_generates_is_drilled(yaml) -> None:
    assert Site(load_config(yaml), None).model == "writer"
    for name in ("vectors", "nobody"):
        with pytest.raises(UsageError, match="writer"):
            Site(load_config(yaml), name)


def test_a_cluster_that_does_not_run_is_not_drilled(yaml) -> None:
    with pytest.raises(ControlError, match="manta up"):
        Site(load_config(yaml), None).dashboard()


def test_what_belongs_to_no_listed_replica_is_left_over() -> None:
    details = recorded("serve_running.json")
    actors = recorded("actors.json")["data"]["result"]["result"]
    living = {actor["name"] for actor in actors if actor["state"] == "ALIVE" and actor["name"].startswith("manta:")}
    assert living
    assert extra_actors(details, actors) == []
    emptied = {**details, "applications": {}}
    found = extra_actors(emptied, actors)
    assert {f"actor {name}" for name in living} <= set(found)
    assert not [each for each in found if "CONTROLLER" in each or "PROXY" in each]


def test_placement_groups_belong_to_replicas_by_their_names() -> None:
    details = recorded("serve_running.json")
    app, replica = next(
        (name, replica["replica_id"])
        for name, app in details["applications"].items()
        for deployment in app["deployments"].values()
        for replica in deployment["replicas"]
    )
    groups = [
        {"name": f"SERVE_REPLICA::{app}#Replica#{replica}", "state": "CREATED"},
        {"name": f"SERVE_REPLICA::{app}#Replica#gone", "state": "CREATED"},
        {"name": f"SERVE_REPLICA::{app}#Replica#removed", "state": "REMOVED"},
        {"name": "somebody-elses", "state": "CREATED"},
    ]
    assert extra_placement_groups(details, groups) == [f"placement group SERVE_REPLICA::{app}#Replica#gone"]


def test_idle_means_that_nothing_is_held_anywhere() -> None:
    entry = {"model": "writer", "num_running": 0, "num_waiting": 0, "kv_used_fraction": 0.0}
    health = {"num_requests": 0, "models": [entry]}
    assert is_idle(health, "writer")
    assert not is_idle({}, "writer")
    assert not is_idle(health, "other")
    assert not is_idle(health | {"num_requests": 1}, "writer")
    for name in ("num_running", "num_waiting", "kv_used_fraction"):
        assert not is_idle(health | {"models": [entry | {name: 0.5}]}, "writer")


def test_answers_are_comparable_where_company_cannot_change_them() -> None:
    assert comparable({"dtype": "float32", "kernels": "torch"})[0]
    assert comparable({"dtype": "bfloat16", "kernels": "native"})[0]
    for kernels in ("torch", "auto"):
        assert not comparable({"dtype": "bfloat16", "kernels": kernels})[0]


def test_memory_slopes_leave_out_the_beginning() -> None:
    times = [float(second) for second in range(0, 600, 10)]
    sizes = [10**9 * (index < 5) + 1_000_000 + 2_000 * index for index in range(60)]
    assert slope(times, sizes) == pytest.approx(12_000)
    memory = Memory({}, times, {"leaking": [2_000_000 * index for index in range(60)], "flat": [5] * 60})
    assert not memory.is_flat().kept
    assert "leaking +11.44 MiB/min" in memory.is_flat().detail
    assert Memory({}, times, {"flat": [5] * 60}).is_flat().kept


def test_memory_is_that_of_real_processes_and_those_that_ended_have_no_slope() -> None:
    memory = Memory({"this": psutil.Process()})
    memory.sample()
    memory.sample()
    memory.resident_bytes["gone"] = [1]
    assert memory.resident_bytes["this"][0] > 2**20
    assert memory.growth().keys() == {"this"}


def test_replicas_are_set_exactly(yaml) -> None:
    model = with_replicas(load_config(yaml).models[1], 2)
    assert (model.replicas.min, model.replicas.max) == (2, 2)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["drill"], "CONFIG is missing"),
        (["drill", "{yaml}"], "--yes"),
        (["drill", "{yaml}", "explode", "--yes"], "kill-stage"),
        (["drill", "{yaml}", "--model", "nobody", "--yes"], "writer"),
    ],
)
def test_wrong_usage_is_status_2_and_nothing_happens(yaml, capsys, argv, reason) -> None:
    assert main([word.format(yaml=yaml) for word in argv]) == 2
    captured = capsys.readouterr()
    assert reason in captured.err
    assert captured.out == ""


def test_a_drill_of_what_does_not_run_is_status_1(yaml, capsys) -> None:
    assert main(["drill", str(yaml), "--yes"]) == 1
    assert "manta up" in capsys.readouterr().err


def test_the_list_names_every_scenario_in_80_columns(capsys) -> None:
    assert main(["drill", "--list"]) == 0
    shown = capsys.readouterr().out
    for name in ("kill-stage", "stop-stage", "kill-all", "update", "overload", "disconnect", "head", "soak"):
        assert name in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


EXPORTED = """\
# HELP ray_manta_recovery_seconds Recovery from lost stages, by part.
ray_manta_recovery_seconds_bucket{WorkerId="a",le="0.5",model="writer",part="detect"} 1.0
ray_manta_recovery_seconds_bucket{WorkerId="a",le="1.0",model="writer",part="detect"} 2.0
ray_manta_recovery_seconds_bucket{WorkerId="a",le="+Inf",model="writer",part="detect"} 3.0
ray_manta_recovery_seconds_count{WorkerId="a",model="writer",part="detect"} 3.0
ray_manta_recovery_seconds_sum{WorkerId="a",model="writer",part="detect"} 4.5
ray_manta_recovery_seconds_count{WorkerId="b",model="writer",part="detect"} 1.0
ray_manta_recovery_seconds_sum{WorkerId="b",model="writer",part="detect"} 0.5
ray_manta_recovery_seconds_bucket{WorkerId="b",le="1.0",model="writer",part="detect"} 1.0
ray_manta_recovery_seconds_count{WorkerId="a",model="writer",part="spawn"} 2.0
ray_manta_recovery_seconds_sum{WorkerId="a",model="writer",part="spawn"} 6.0
ray_manta_recovery_seconds_sum{WorkerId="c",model="other",part="spawn"} 600.0
ray_manta_steps_total{model="writer"} 7.0
"""


def test_the_replicas_account_is_summed_over_processes_and_told_by_its_parts() -> None:
    parts = read_parts(EXPORTED, "writer")
    assert parts == {
        "detect": Part(count=4.0, seconds=5.0, num_fast=3.0),
        "spawn": Part(count=2.0, seconds=6.0, num_fast=0.0),
    }
    assert describe_parts(parts) == "detect 1.25 s, spawn 3.00 s"
    assert not noticed_at_once(parts["detect"]).kept
    before = {"detect": Part(count=3.0, seconds=4.9, num_fast=2.0), "spawn": parts["spawn"]}
    since = added(before, parts)
    assert since.keys() == {"detect"}
    assert since["detect"].mean_s == pytest.approx(0.1)
    assert noticed_at_once(since["detect"]).kept


def test_metrics_of_agents_that_cannot_be_reached_are_left_out() -> None:
    (port,) = unused_ports(1)
    with RecordedDashboard({"/metrics": ["ray_manta_steps_total 1.0\n"]}) as agent:
        targets = [{"targets": [agent.url.removeprefix("http://"), f"127.0.0.1:{port}"], "labels": {}}]
        with RecordedDashboard({"/api/prometheus/sd": [targets]}) as dashboard:
            assert dashboard.metrics() == "ray_manta_steps_total 1.0\n"


def test_results_fit_80_columns_and_say_what_was_broken(capsys) -> None:
    times = Pause(p50_s=123.4, max_s=234.56, recover_s=345.67)
    parts = {"detect": Part(count=2, seconds=12.0)}
    broken = Promise(
        text="every request is answered", kept=False, detail="3 of 99999 failed: chat: error, " + "x" * 90
    )
    told = Promise(text="goodput is at least 90% of its peak", kept=True, detail="97 of 100 tokens/s", shown=True)
    results = [
        Result(scenario="kill-replica", num_requests=9999, num_failed=3, num_changed=9999, pause=times, parts=parts),
        Result(scenario="overload", num_requests=9, num_failed=3, promises=(broken, told), notes=("a note",)),
        Result(scenario="head", skipped="nothing is persisted"),
    ]
    Console(width=80).print(results_view(results, ["answers are compared"]))
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert "123.4/234.6 s  6.00 s  345.7 s  kept" in shown
    assert "kill-replica" in shown, "names are whole"
    for text in (
        "kept",
        "BROKEN",
        "3 of 99999 failed",
        "97 of 100",
        "a note",
        "nothing is persisted",
        "are compared",
    ):
        assert text in shown
    found = results_json(results, [], "writer")
    assert [each["verdict"] for each in found["scenarios"]] == ["kept", "broken", "skipped"]
    assert found["kept"] is False
    assert found["scenarios"][0]["parts_s"] == {"detect": 6.0}
