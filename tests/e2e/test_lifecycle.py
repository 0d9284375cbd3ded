"""The life of a local cluster through the command alone: interrupted, repeated, changed, broken, killed, ended."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.support.running import Cluster, exact_kernels, free_ports, save_tiny_chat, write_cluster

pytestmark = pytest.mark.e2e

WAIT_S = 120.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A config that nothing runs of yet; whatever the tests start is ended."""
    directory = tmp_path_factory.mktemp("lifecycle")
    save_tiny_chat(directory / "chat", seed=1)
    model = {
        "name": "tiny",
        "source": f"path://{directory / 'chat'}",
        **exact_kernels(),
        "context_tokens": 128,
        "pipeline": {"stages": 2, "threads": 1},
        "timeouts": {"drain": "5s"},
    }
    cluster = write_cluster(directory, "lifecycle", [model])
    try:
        yield cluster
    finally:
        cluster.down()


def wait_for(what: Callable[[], Any]) -> Any:
    """The first true value of ``what()``; fails after two minutes."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.1)
    pytest.fail(f"{what} did not come true within {WAIT_S:g} s")


def state_file(cluster: Cluster) -> Path:
    return cluster.storage / "clusters" / "lifecycle" / "local.json"


def recorded_pid(cluster: Cluster) -> int | None:
    return json.loads(state_file(cluster).read_text())["pid"] if state_file(cluster).exists() else None


def actions(cluster: Cluster) -> list[str]:
    """Kinds of the actions of one ``manta up``, which must succeed."""
    done = cluster.manta("up", str(cluster.config), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return [action["kind"] for action in json.loads(done.stdout)["actions"]]


def replica(cluster: Cluster) -> dict[str, Any]:
    """The one running replica."""
    (model,) = cluster.status()["models"]
    (version,) = model["versions"]
    (found,) = [replica for replica in version["replicas"] if replica["state"] == "RUNNING"]
    return found


def ask(cluster: Cluster) -> int:
    """HTTP status of one small completion."""
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 4}
    return requests.post(f"{cluster.url}/v1/completions", json=body, timeout=60).status_code


def test_ctrl_c_leaves_a_cluster_that_up_and_down_understand(cluster: Cluster) -> None:
    command = [sys.executable, "-m", "cluster", "up", str(cluster.config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as up:
        wait_for(lambda: recorded_pid(cluster))
        second = cluster.manta("up", str(cluster.config))
        assert second.returncode == 1
        assert f"another manta (pid {up.pid}) is changing this cluster" in second.stderr
        up.send_signal(signal.SIGINT)
        output = up.communicate(timeout=WAIT_S)[0]
    assert up.returncode == 130, output
    assert "Interrupted. Run the same command again" in output
    assert psutil.pid_exists(recorded_pid(cluster))
    cluster.down()
    assert not state_file(cluster).exists()


def test_up_serves_and_a_second_up_does_nothing(cluster: Cluster) -> None:
    assert "answered:" in cluster.up()
    assert ask(cluster) == 200
    before = replica(cluster)
    assert actions(cluster) == ["nothing"]
    after = replica(cluster)
    assert (after["id"], after["pid"]) == (before["id"], before["pid"])
    assert [stage["pid"] for stage in after["stages"]] == [stage["pid"] for stage in before["stages"]]
    assert [stage["state"] for stage in before["stages"]] == ["ALIVE", "ALIVE"]
    assert all(psutil.pid_exists(stage["pid"]) for stage in before["stages"])


def test_nothing_listens_beyond_this_machine(cluster: Cluster) -> None:
    """Serve's replicas open one inter-replica port that Ray binds to all interfaces; nothing else may."""
    pids = {int(line.split()[0]): line.split()[1] for line in cluster.leftovers()}
    open_to_all = [
        (pids[pid], connection.laddr.port)
        for pid in pids
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")
    ]
    assert all(name.startswith("ray::ServeRepli") for name, _ in open_to_all), open_to_all


def test_changed_limits_restart_nothing(cluster: Cluster) -> None:
    before = replica(cluster)["id"]
    cluster.edit(lambda values: values["gateway"].update(limits={"max_choices": 2}))
    assert actions(cluster) == ["switch_routes"]
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "n": 3}
    refused = requests.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert refused.status_code == 400
    assert replica(cluster)["id"] == before


def test_a_model_that_cannot_start_shows_its_own_error_and_the_old_one_keeps_serving(cluster: Cluster) -> None:
    before = replica(cluster)["id"]
    good = cluster.config.read_text()
    cluster.edit(lambda values: values["models"][0].update(kv_cache={"tokens": 2**30}))
    broken = cluster.manta("up", str(cluster.config))
    assert broken.returncode == 1
    assert "tiny-v1 failed to start:" in broken.stderr
    assert re.search("allocate.*kv_cache.tokens|can.t allocate memory", broken.stderr)
    assert "Traceback" not in broken.stderr
    assert ask(cluster) == 200
    cluster.config.write_text(good)
    cluster.up()
    assert replica(cluster)["id"] == before


def test_another_http_port_moves_the_gateway_and_nothing_else(cluster: Cluster) -> None:
    good, before = cluster.config.read_text(), replica(cluster)["id"]
    (port,) = free_ports(1)
    cluster.edit(lambda values: values["gateway"]["http"].update(port=port))
    cluster.up()
    assert requests.get(f"http://127.0.0.1:{port}/health", timeout=10).status_code == 200
    assert replica(cluster)["id"] == before
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        taken = stranger.getsockname()[1]
        cluster.edit(lambda values: values["gateway"]["http"].update(port=taken))
        refused = cluster.manta("up", str(cluster.config))
    assert refused.returncode == 1
    assert f"gateway.http: port {taken} on 127.0.0.1 is taken by process" in refused.stderr
    assert requests.get(f"http://127.0.0.1:{port}/health", timeout=10).status_code == 200
    cluster.config.write_text(good)
    cluster.up()
    assert ask(cluster) == 200


def test_logs_and_chat(cluster: Cluster) -> None:
    logs = cluster.manta("logs", "tiny", str(cluster.config), "--json")
    assert any("is ready" in json.loads(line)["line"] for line in logs.stdout.splitlines()), logs.stderr
    answer = cluster.manta("chat", "tiny", "hello", "--config", str(cluster.config))
    assert answer.returncode == 0, answer.stderr
    unknown = cluster.manta("chat", "nope", "hello", "--config", str(cluster.config))
    assert unknown.returncode == 1
    assert "tiny" in unknown.stderr


def test_up_after_everything_was_killed(cluster: Cluster) -> None:
    for line in cluster.leftovers():
        psutil.Process(int(line.split()[0])).kill()
    wait_for(lambda: cluster.status()["ray"] == "stopped")
    cluster.up()
    assert ask(cluster) == 200


def test_down_ends_everything_and_twice_is_fine(cluster: Cluster) -> None:
    cluster.down()
    again = cluster.manta("down", str(cluster.config))
    assert again.returncode == 0
    assert "Nothing of cluster lifecycle runs." in again.stdout
    assert cluster.status()["ray"] == "stopped"
