"""A Ray of several nodes on this machine: raylets that come, drain and go; nothing is left afterwards.

Each has a loopback address of its own, 127.0.0.2 and so on: Ray replaces 127.0.0.1 by one that others can reach.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._raylet import GcsClient

from cluster.control import processes
from cluster.control.local import ray_environment
from tests.support.running import Cluster, free_ports

_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_START_TIMEOUT_S = 120.0
_MAX_STARTS = 4
_connections = itertools.count()


class NodeFailedError(Exception):
    """``ray start`` ended by itself; what it printed."""


class Raylets:
    """One head and any number of workers, each a process group of its own that ``ray start --block`` watches."""

    def __init__(self, **environment: str) -> None:
        self.port, self.dashboard_port, client_port, *metric_ports = free_ports(5)
        self.temp_dir = Path(f"/tmp/manta-test-{self.port}")
        several_nodes = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
        at_once = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
        self._environment = ray_environment(os.environ, metric_ports) | several_nodes | at_once | environment
        self._address = f"127.0.0.2:{self.port}"
        self._client_port = client_port
        self._head: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[bytes]] = []

    def connect(self) -> None:
        """Make this process a driver, with a job number that no earlier cluster gave to it.

        An actor's id follows from the number of its job alone: a handle to an actor of an earlier cluster that is
        collected late would take away the only reference to the actor of the same id here.
        """
        for _ in range(next(_connections)):
            ray.init(address=self.address, _node_ip_address="127.0.0.2", log_to_driver=False)
            ray.shutdown()
        ray.init(address=self.address, _node_ip_address="127.0.0.2", log_to_driver=False)

    @property
    def dashboard_url(self) -> str:
        """Base URL of the dashboard."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def gcs(self) -> GcsClient:
        """A client of the control store."""
        return GcsClient(address=self._address)

    def start_head(self, num_cpus: int, **resources: float) -> None:
        """The node with the control store and the dashboard; again after :meth:`kill_head`, on the same port."""
        options = {
            "node-ip-address": "127.0.0.2",
            "port": self.port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": self.dashboard_port,
            "ray-client-server-port": self._client_port,
            "temp-dir": self.temp_dir,
            "resources": json.dumps(resources),
        }
        self._head = self._start("--head", num_cpus, options)

    def kill_head(self) -> None:
        """``kill -9`` of the head and everything on it: control store, dashboard, raylet, its workers."""
        assert self._head is not None
        head = psutil.Process(self._head.pid)
        for process in [head, *head.children(recursive=True)]:
            process.kill()
        self._head.wait()

    @property
    def address(self) -> str:
        """Of the control store; what ``ray.init`` of a driver on the head is given."""
        return self._address

    def add_node(self, num_cpus: int, **resources: float) -> str:
        """One more node, with custom resources; returns its id."""
        before = self.node_ids()
        host = 3 + len(self._started)
        options = {"node-ip-address": f"127.0.0.{host}", "resources": json.dumps(resources)}
        self._start(f"--address={self._address}", num_cpus, options)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not (new := self.node_ids() - before):
            assert time.monotonic() < deadline, "the node never came"
            time.sleep(0.2)
        (node_id,) = new
        return node_id

    def node_ids(self) -> set[str]:
        """Ids of the nodes that live."""
        return {node_id.hex() for node_id, node in self.gcs.get_all_node_info(timeout=30).items() if node.state == 0}

    @contextmanager
    def serving(self, cluster: Cluster) -> Iterator[Cluster]:
        """The cluster, changed so that it runs on these nodes: up, and down again."""
        cluster.edit(self._attach)
        try:
            cluster.up()
            yield cluster
        finally:
            down = cluster.manta("down", str(cluster.config))
        assert down.returncode == 0, down.stdout + down.stderr

    def _attach(self, values: dict[str, Any]) -> None:
        values["cluster"]["provider"] = {"kind": "existing", "dashboard": self.dashboard_url}
        values["cluster"]["nodes"] = [{"name": "box", "resources": {"CPU": 2}, "min": 2, "max": 4}]

    def drain(self, node_id: str, seconds: int = 300) -> None:
        """Announce that a node will be taken away, as a cloud does with a machine."""
        command = [*_RAY, "drain-node", f"--address={self._address}", f"--node-id={node_id}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
        command += [f"--deadline-remaining-seconds={seconds}"]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def _start(self, kind: str, num_cpus: int, options: dict[str, Any]) -> subprocess.Popen[bytes]:
        """Tried again as whoever runs a node would.

        A raylet gives its agent 15 s to tell its ports, whatever the options, and ends; a busy machine takes longer.
        """
        for _ in range(_MAX_STARTS - 1):
            with suppress(NodeFailedError):
                return self._start_once(kind, num_cpus, options)
        return self._start_once(kind, num_cpus, options)

    def _start_once(self, kind: str, num_cpus: int, options: dict[str, Any]) -> subprocess.Popen[bytes]:
        common = {
            "dashboard-agent-listen-port": free_ports(1)[0],
            "min-worker-port": 0,
            "max-worker-port": 0,
            "object-store-memory": 100 * 2**20,
            "num-cpus": num_cpus,
        }
        words = [f"--{name}={value}" for name, value in (common | options).items()]
        self.temp_dir.mkdir(parents=True, exist_ok=True)
        # written by a head before; Ray would believe that it still runs
        (self.temp_dir / "ray_current_cluster").unlink(missing_ok=True)
        log = self.temp_dir / f"start-{len(self._started)}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*_RAY, "start", kind, "--block", "--disable-usage-stats", *words],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while "Ray runtime started" not in log.read_text():
            if process.poll() is not None:
                raise NodeFailedError(log.read_text())
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        return process

    def stop(self) -> None:
        """End every node, workers first, and whatever they left behind."""
        ray.shutdown()
        workers = [process for process in self._started if process is not self._head]
        for process in (*workers, *filter(None, [self._head])):
            processes.end([psutil.Process(process.pid)] if process.poll() is None else [], patience_s=20.0)
            process.wait()
        assert not processes.end(processes.session_writers(self.temp_dir), patience_s=3.0)
        shutil.rmtree(self.temp_dir, ignore_errors=True)
