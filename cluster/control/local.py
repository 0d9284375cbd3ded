"""The local provider: a config in, a Ray on this machine that only this machine can reach out; and its end.

Ray runs as ``ray start --head --block`` in a session of its own. It listens on the loopback address alone: Ray
replaces ``--node-ip-address 127.0.0.1`` by an outward address unless told that clusters are off
(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which on Linux means just that). Ports that Ray would fix (client server,
metrics) are chosen free at each start, so that another Ray on the machine is not disturbed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from cluster.config.nodes import LocalProvider
from cluster.config.schema import ClusterConfig
from cluster.control import processes
from cluster.control.dashboard import Dashboard
from cluster.control.observe import observed_from
from cluster.control.ports import require_free, unused_ports
from cluster.control.state import LocalState, forget_state, read_state, state_directory, write_state
from cluster.control.wait import longest_drain_s, patient_details
from cluster.errors import ControlError

Say = Callable[[str], None]
"""Receives one sentence of progress."""

_HOST = "127.0.0.1"
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 45.0
_DRAIN_TIMEOUT_S = 5
"""Ray's own drain on SIGTERM; applications are gone by then."""
_POLL_S = 0.2
_LOG_LINES = 15


class LocalRay:
    """The Ray of one config on this machine."""

    def __init__(self, config: ClusterConfig) -> None:
        assert isinstance(config.cluster.provider, LocalProvider)
        self._provider = config.cluster.provider
        self._config = config
        self.directory = state_directory(config)
        self.temp_dir = Path(self._provider.temp_dir_of(config.name))
        self.dashboard_url = f"http://{_HOST}:{self._provider.dashboard_port}"

    def running(self) -> LocalState | None:
        """State of the Ray that was started from this config's name and still runs, else None.

        Raises ControlError when it was started with other ports or resources than the config now has.
        """
        state = read_state(self.directory)
        if state is None or not state.alive:
            return None
        changed = [key for key, value in self._settings().items() if state.settings.get(key) != value]
        if changed:
            details = "; ".join(
                f"{key} is now {self._settings()[key]}, Ray runs with {state.settings.get(key)}" for key in changed
            )
            raise ControlError(
                f"Ray of cluster {self._config.name} cannot change this while it runs: {details}; "
                "run `manta down` and then `manta up`, or write the old value"
            )
        return state

    def dashboard(self) -> Dashboard | None:
        """The dashboard of the Ray that runs, None when it does not."""
        state = self.running()
        return None if state is None else self._await_dashboard(state)

    def start(self, say: Say) -> Dashboard:
        """Start Ray unless it runs, and wait until its dashboard answers."""
        state = self.running()
        if state is None:
            self._end_leftovers(say)
            self._check_ports()
            say("Starting Ray on this machine.")
            state = self._spawn()
        return self._await_dashboard(state)

    def stop(self, say: Say) -> bool:
        """End the Ray that was started, and nothing else; False when there was none."""
        state = read_state(self.directory)
        if state is None:
            return False
        if state.alive:
            assert state.pid is not None
            self._delete_applications(state, say)
            say(f"Stopping Ray (pid {state.pid}).")
            with suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
                processes.end([psutil.Process(state.pid)], patience_s=_STOP_TIMEOUT_S)
        self._end_leftovers(say)
        return True

    def log_path(self) -> Path:
        """Where ``ray start`` writes."""
        return self.directory / "ray.log"

    def _settings(self) -> dict[str, str | int | float | dict[str, float]]:
        resources = self._config.cluster.nodes[0].resources
        return {
            "cluster.provider.ray_port": self._provider.ray_port,
            "cluster.provider.dashboard_port": self._provider.dashboard_port,
            "cluster.provider.temp_dir": str(self.temp_dir),
            "cluster.provider.object_store": self._provider.object_store,
            "resources.CPU": resources.CPU,
            "resources.GPU": resources.GPU,
            "resources.memory": resources.memory or 0,
            "resources": dict(resources.custom),
        }

    def _end_leftovers(self, say: Say) -> None:
        """End what an earlier start left behind, and forget it."""
        state = read_state(self.directory)
        directory = self.temp_dir if state is None else Path(state.temp_dir)
        found = processes.session_writers(directory, None if state is None else state.pid)
        if state is None:
            if found:
                raise ControlError(
                    f"cluster.provider.temp_dir: process {found[0].pid} ({found[0].name()}), which this cluster did "
                    f"not start, writes to {directory}; write another temp_dir, or end it"
                )
            return
        if found:
            say(f"Ending {len(found)} processes that an earlier Ray left behind.")
        remaining = processes.end(found, patience_s=3.0)
        if remaining:
            raise ControlError(f"processes {remaining} of {directory} do not end; end them by hand and try again")
        (directory / "ray_current_cluster").unlink(missing_ok=True)  # else `ray start` believes that it still runs
        forget_state(self.directory)

    def _check_ports(self) -> None:
        require_free(self._provider.ray_port, "cluster.provider.ray_port")
        require_free(self._provider.dashboard_port, "cluster.provider.dashboard_port")
        http = self._config.gateway.http
        require_free(http.port, "gateway.http.port", http.host)

    def _spawn(self) -> LocalState:
        intent = LocalState(
            pid=None,
            started_at=None,
            temp_dir=str(self.temp_dir),
            dashboard_url=self.dashboard_url,
            settings=self._settings(),
        )
        command = self._command()
        with _interrupts_deferred():
            write_state(self.directory, intent)
            with self.log_path().open("w") as log:
                child = subprocess.Popen(  # noqa: S603 (our own interpreter, arguments from the validated config)
                    command,
                    cwd=self.directory,
                    env=ray_environment(os.environ, unused_ports(2)),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            started_at = psutil.Process(child.pid).create_time()
            state = intent.model_copy(update={"pid": child.pid, "started_at": started_at})
            write_state(self.directory, state)
        return state

    def _command(self) -> list[str]:
        resources = self._config.cluster.nodes[0].resources
        client_port, agent_port = unused_ports(2)
        options = {
            "node-ip-address": _HOST,
            "port": self._provider.ray_port,
            "dashboard-host": _HOST,
            "dashboard-port": self._provider.dashboard_port,
            "ray-client-server-port": client_port,
            "dashboard-agent-listen-port": agent_port,
            "min-worker-port": 0,
            "max-worker-port": 0,
            "temp-dir": self.temp_dir,
            "object-store-memory": self._provider.object_store,
            "num-cpus": int(resources.CPU),
            "num-gpus": int(resources.GPU),
            "resources": json.dumps(resources.custom),
        } | ({} if resources.memory is None else {"memory": resources.memory})
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        return start + [f"--{name}={value}" for name, value in options.items()]

    def _await_dashboard(self, state: LocalState) -> Dashboard:
        dashboard = Dashboard(self.dashboard_url)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not dashboard.is_up():
            if not state.alive:
                raise ControlError(
                    f"Ray ended while it started; the last lines of {self.log_path()}:\n{self._log_tail()}"
                )
            if time.monotonic() > deadline:
                raise ControlError(
                    f"the Ray dashboard did not answer at {self.dashboard_url} within {_START_TIMEOUT_S:g} s; "
                    f"see {self.log_path()}, and `manta down` before the next try"
                )
            time.sleep(_POLL_S)
        return dashboard

    def _log_tail(self) -> str:
        lines = self.log_path().read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def _delete_applications(self, state: LocalState, say: Say) -> None:
        dashboard = Dashboard(state.dashboard_url)
        if not dashboard.is_up():
            return
        say("Removing the applications; replicas finish what they are doing.")
        try:
            own = observed_from(patient_details(dashboard, time.monotonic() + _STOP_TIMEOUT_S)).own
            dashboard.delete_applications(drain_s=longest_drain_s(app.config for app in own.values()))
        except ControlError as error:
            say(f"Applications were not removed in good order: {error}")


def ray_environment(current: Mapping[str, str], metric_ports: list[int]) -> dict[str, str]:
    """Environment of ``ray start``, which all its processes inherit: the current one, and what Ray reads there."""
    kept = {name: value for name, value in current.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    # Serve's controller looks every 0.1 s by default, which takes a fifth more of an idle stack's processor time.
    kept.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    return kept | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(_DRAIN_TIMEOUT_S),
        "RAY_worker_niceness": "0",  # by default 15: whatever else wakes on the machine sets stages aside
        "DASHBOARD_METRIC_PORT": str(metric_ports[0]),
        "AUTOSCALER_METRIC_PORT": str(metric_ports[1]),
    }


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Hold back Ctrl-C until the block ends, so that a started process and its record cannot come apart.

    A Python handler, unlike a blocked or ignored signal, is not inherited by the child.
    """
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the signature of a handler)
        received.append(number)

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        raise KeyboardInterrupt
