"""What a machine remembers of its Ray, and how leftovers are found: state file, lock, ports, processes. No Ray."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.config.schema import ClusterConfig
from cluster.control import processes
from cluster.control.local import LocalRay, ray_environment
from cluster.control.ports import is_free, require_free, unused_ports
from cluster.control.state import LocalState, exclusive, forget_state, read_state, state_directory, write_state
from cluster.errors import ControlError
from tests.unit.cluster.plan_examples import config


def state(**changes: object) -> LocalState:
    fields = {
        "pid": os.getpid(),
        "started_at": psutil.Process().create_time(),
        "temp_dir": "/nowhere",
        "dashboard_url": "http://127.0.0.1:1",
        "settings": {},
    }
    return LocalState.model_validate(fields | changes)


def local(tmp_path: Path, **provider: object) -> ClusterConfig:
    data = config().model_dump(mode="json")
    data["storage"] = str(tmp_path / "storage")
    data["cluster"]["provider"] = {"kind": "local", "temp_dir": str(tmp_path / "ray"), **provider}
    return ClusterConfig.model_validate(data)


def test_state_is_read_back_and_forgotten(tmp_path):
    assert read_state(tmp_path) is None
    write_state(tmp_path, state())
    assert read_state(tmp_path) == state()
    assert [path.name for path in tmp_path.iterdir()] == ["local.json"]
    forget_state(tmp_path)
    forget_state(tmp_path)
    assert read_state(tmp_path) is None


def test_a_damaged_state_file_is_refused_with_its_path(tmp_path):
    (tmp_path / "local.json").write_text('{"pid": "many"')
    with pytest.raises(ControlError, match=r"local\.json is not readable"):
        read_state(tmp_path)


def test_this_process_is_alive_and_another_with_its_pid_is_not():
    assert state().alive
    assert not state(started_at=psutil.Process().create_time() - 100).alive
    assert not state(pid=None, started_at=None).alive


def test_a_process_that_ended_is_not_alive():
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        started_at = psutil.Process(child.pid).create_time()
        child.wait()
    assert not state(pid=child.pid, started_at=started_at).alive


def test_state_of_remote_storage_lives_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    remote = config().model_copy(update={"storage": "s3://bucket/manta"})
    assert state_directory(remote) == tmp_path / ".manta" / "clusters" / "test"


def test_one_manta_at_a_time(tmp_path):
    holder = f"another manta .pid {os.getpid()}. is changing"
    with exclusive(tmp_path), pytest.raises(ControlError, match=holder), exclusive(tmp_path):
        pytest.fail("two holders of one lock")
    with exclusive(tmp_path):
        pass


def test_a_taken_port_is_named_with_the_key_to_change():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not is_free(port)
        with pytest.raises(ControlError, match=f"cluster.provider.ray_port: port {port} on 127.0.0.1 is taken"):
            require_free(port, "cluster.provider.ray_port")
    assert len(set(unused_ports(5))) == 5


def test_an_address_of_another_machine_is_not_called_a_taken_port():
    with pytest.raises(ControlError, match=r"gateway\.http\.port: nothing can listen .* of 192\.0\.2\.1 .*assign"):
        require_free(8000, "gateway.http.port", "192.0.2.1")


WRITER = "import sys, time; file = open(sys.argv[1], 'a'); print('open', flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WRITER
READER = WRITER.replace("'a'", "'r'")


def session_log(temp_dir: Path, pid: int) -> Path:
    """A log of the Ray session that process ``pid`` began."""
    logs = temp_dir / f"session_2026-01-01_00-00-00_000000_{pid}" / "logs"
    logs.mkdir(parents=True)
    return logs / "raylet.out"


@pytest.fixture
def start(tmp_path):
    """Start Python code with a file as its argument; all are ended afterwards."""
    started = []

    def run(code: str, path: Path) -> int:
        child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        return child.pid

    yield run
    for child in started:
        child.kill()
        child.wait()
        child.stdout.close()


def test_writers_under_a_directory_are_found_and_readers_are_not(tmp_path, start):
    inside, outside = tmp_path / "ray", tmp_path / "ray-other"
    for directory in (inside, outside):
        directory.mkdir()
        (directory / "log").write_text("")
    writer = start(WRITER, inside / "log")
    start(READER, inside / "log")
    start(WRITER, outside / "log")
    assert [process.pid for process in processes.writers_under(inside)] == [writer]


def test_a_process_that_ignores_the_polite_signal_is_ended_all_the_same(tmp_path, start):
    (tmp_path / "log").write_text("")
    pid = start(STUBBORN, tmp_path / "log")
    assert processes.end(processes.writers_under(tmp_path), patience_s=0.1) == []
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_stopping_what_was_never_started_is_fine(tmp_path):
    assert not LocalRay(local(tmp_path)).stop(lambda _: None)


def test_a_stale_state_is_cleaned_up_with_what_it_left_behind(tmp_path, start):
    ray = LocalRay(local(tmp_path))
    log = session_log(tmp_path / "ray", os.getpid())
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    pid = start(WRITER, log)
    another_ray = start(WRITER, session_log(tmp_path / "ray", 1))
    editor = start(WRITER, tmp_path / "ray" / "notes")
    write_state(ray.directory, state(started_at=1.0, temp_dir=str(tmp_path / "ray")))
    assert ray.running() is None
    assert ray.stop(lambda _: None)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert read_state(ray.directory) is None
    assert not (tmp_path / "ray" / "ray_current_cluster").exists()
    assert all(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in (another_ray, editor))


def test_an_interrupted_start_leaves_a_state_that_down_and_up_understand(tmp_path):
    ray = LocalRay(local(tmp_path))
    write_state(ray.directory, state(pid=None, started_at=None, temp_dir=str(tmp_path / "ray")))
    assert ray.dashboard() is None
    assert ray.stop(lambda _: None)
    assert not ray.stop(lambda _: None)


def test_a_directory_that_somebody_else_writes_to_is_refused_not_cleaned(tmp_path, start):
    pid = start(WRITER, session_log(tmp_path / "ray", 1))
    with pytest.raises(ControlError, match=rf"cluster\.provider\.temp_dir: process {pid} .*did not start"):
        LocalRay(local(tmp_path)).start(lambda _: None)
    assert psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_taken_port_stops_the_start_before_anything_is_started(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        ray = LocalRay(local(tmp_path, ray_port=port))
        with pytest.raises(ControlError, match=rf"cluster\.provider\.ray_port: port {port}"):
            ray.start(lambda _: None)
    assert read_state(ray.directory) is None


def test_ray_that_runs_with_other_resources_is_refused_with_both(tmp_path):
    ray = LocalRay(local(tmp_path))
    write_state(ray.directory, state(settings={**ray._settings(), "resources.CPU": 16.0}))
    with pytest.raises(ControlError, match=r"resources.CPU is now 2.0, Ray runs with 16.0; run `manta down`"):
        ray.running()


def test_ray_listens_on_the_loopback_address_only_and_sends_nothing_home():
    environment = ray_environment({"RAY_ADDRESS": "x", "PATH": "/bin"}, [1, 2])
    assert "RAY_ADDRESS" not in environment
    assert environment["PATH"] == "/bin"
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert environment["RAY_AUTH_MODE"] == "disabled"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["RAY_worker_niceness"] == "0"


@pytest.mark.parametrize(("current", "expected"), [({}, "0.5"), ({"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "2"}, "2")])
def test_serves_controller_looks_twice_a_second_unless_told_otherwise(current, expected):
    assert ray_environment(current, [1, 2])["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"] == expected


def test_every_port_and_resource_is_given_to_ray(tmp_path):
    command = LocalRay(local(tmp_path, ray_port=1234, dashboard_port=1235))._command()
    options = dict(part.removeprefix("--").split("=", 1) for part in command if "=" in part)
    assert {key: options[key] for key in ("port", "dashboard-port", "dashboard-host", "num-cpus", "num-gpus")} == {
        "port": "1234",
        "dashboard-port": "1235",
        "dashboard-host": "127.0.0.1",
        "num-cpus": "2",
        "num-gpus": "0",
    }
    assert options["memory"] == str(8 * 2**30)
    assert json.loads(options["resources"]) == {"train_slot": 2.0}
