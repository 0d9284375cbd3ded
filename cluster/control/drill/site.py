"""The running cluster as a drill needs it: its config in; processes to hurt, changes to make, leftovers out.

Every method blocks; the drill calls them on threads. Nothing is hurt but a process that Ray's own table lists as a
replica or stage of this config's model, that runs on this machine, and that bears the name Ray gives such a process.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from cluster.config.models import ModelConfig
from cluster.config.nodes import LocalProvider
from cluster.config.schema import ClusterConfig
from cluster.control import processes
from cluster.control.apply import plan_actions, up
from cluster.control.dashboard import Dashboard
from cluster.control.drill.leftovers import (
    REPLICA_TITLE,
    STAGE_TITLE,
    extra_actors,
    extra_placement_groups,
    stray_processes,
)
from cluster.control.drill.parts import Parts, read_parts
from cluster.control.local import LocalRay
from cluster.control.observe import ModelStatus, ReplicaStatus, StageStatus, VersionStatus, cluster_status
from cluster.control.provider import ray_of
from cluster.control.report import Report
from cluster.errors import ControlError, UsageError
from cluster.plan.diff import Nothing

_UP_TIMEOUT_S = 900.0
_GCS_NAME = "gcs_server"


class Site:
    """One model of one running cluster."""

    def __init__(self, config: ClusterConfig, model: str | None) -> None:
        """``model`` None is the first that generates. UsageError when there is no such model."""
        self.config = config
        self.model = _chosen(config, model)
        self._current = config
        self._addresses = {address.address for found in psutil.net_if_addrs().values() for address in found}

    @property
    def model_config(self) -> ModelConfig:
        """The model's entry in the YAML."""
        return next(model for model in self.config.models if model.name == self.model)

    def dashboard(self) -> Dashboard:
        """The dashboard of the cluster; ControlError when it does not run."""
        dashboard = ray_of(self.config).dashboard()
        if dashboard is None:
            raise ControlError(f"cluster {self.config.name} does not run; start it with `manta up`")
        return dashboard

    def require_settled(self) -> None:
        """ControlError unless the cluster is as the config says: a drill puts it back to that."""
        _, actions = plan_actions(self.config)
        if actions != (Nothing(),):
            todo = " ".join(action.sentence for action in actions)
            raise ControlError(f"the cluster is not as the config says; run `manta up` first. It would: {todo}")

    def version(self) -> VersionStatus:
        """The deployed version of the model; ControlError when there is none, or more than one."""
        found = [each for each in self._models() if each.name == self.model]
        if not found or len(found[0].versions) != 1:
            raise ControlError(f"model {self.model} is not deployed in one version; see `manta status`")
        return found[0].versions[0]

    def _models(self) -> tuple[ModelStatus, ...]:
        return cluster_status(self.config.name, self.dashboard()).models

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """The replicas that run, with all their stages alive."""
        return tuple(replica for replica in self.version().replicas if is_whole(replica))

    def arguments(self) -> dict[str, Any]:
        """What the model's replicas were started with: ModelAppArgs, as JSON."""
        details = self.dashboard().serve_details()
        arguments: dict[str, Any] = details["applications"][self.version().app]["deployed_app_config"]["args"]
        return arguments

    def stage_process(self, stage: StageStatus) -> psutil.Process:
        """The process of a stage; ControlError when it is not here or not what it should be."""
        return self._process(f"stage {stage.index}", stage.node, stage.pid, STAGE_TITLE)

    def replica_process(self, replica: ReplicaStatus) -> psutil.Process:
        """The process of a replica; ControlError when it is not here or not what it should be."""
        title = f"{REPLICA_TITLE}{self.version().app}:"
        return self._process(f"replica {replica.id}", replica.node, replica.pid, title)

    def _process(self, what: str, node: str | None, pid: int | None, title: str) -> psutil.Process:
        if pid is None or node is None:
            raise ControlError(f"{what} of {self.model} has no process now; see `manta status`")
        if node not in self._addresses:
            raise ControlError(
                f"{what} of {self.model} runs on node {node}, but this machine is {socket.gethostname()}; "
                "a drill hurts only processes of its own machine: run it there"
            )
        try:
            process = psutil.Process(pid)
            name = process.name()
        except psutil.NoSuchProcess as error:
            raise ControlError(f"{what} of {self.model} (pid {pid}) is gone; see `manta status`") from error
        if not name.startswith(title):
            raise ControlError(
                f"{what} of {self.model}: process {pid} of this machine is {name!r}, not {title!r}; "
                "it may run in another container, and is left alone"
            )
        return process

    def gcs_process(self) -> psutil.Process:
        """Ray's control store; ControlError unless this config started it and it persists its state."""
        if not isinstance(self.config.cluster.provider, LocalProvider):
            raise ControlError("the head is not this config's to kill: only the local provider starts one")
        for process in self._session_writers():
            if process.name() == _GCS_NAME:
                if "RAY_gcs_storage_path" not in process.environ():
                    raise ControlError(
                        "the control store keeps its state in memory only, so Ray cannot bring it back"
                    )
                return process
        raise ControlError(f"no process {_GCS_NAME} of this cluster is found")

    def gateway_process(self) -> psutil.Process | None:
        """The process of the first gateway replica, None where it is not on this machine."""
        gateway = cluster_status(self.config.name, self.dashboard()).gateway
        first = gateway.replicas[0] if gateway is not None and gateway.replicas else None
        if first is None or first.pid is None or first.node not in self._addresses:
            return None
        return psutil.Process(first.pid)

    def change(self, change: Callable[[ModelConfig], ModelConfig], report: Report) -> None:
        """``manta up`` with the model's entry changed; raises what that raises."""
        models = tuple(change(model) if model.name == self.model else model for model in self.config.models)
        self._apply(self.config.model_copy(update={"models": models}), report)

    def restore(self, report: Report) -> None:
        """``manta up`` with the config as it was written, if something else is in force."""
        if self._current is not self.config:
            self._apply(self.config, report)

    def _apply(self, config: ClusterConfig, report: Report) -> None:
        self._current = config
        up(config, report, timeout_s=_UP_TIMEOUT_S)

    def recovery_parts(self) -> Parts:
        """How the model's replicas have recovered so far; as late as Ray exports it."""
        return read_parts(self.dashboard().metrics(), self.model)

    def leftovers(self) -> list[str]:
        """Stages, placement groups and processes of Manta's that belong to no replica that Serve lists."""
        dashboard = self.dashboard()
        details, actors = dashboard.serve_details(), dashboard.actors()
        groups = dashboard.placement_groups()
        found = extra_actors(details, actors) + extra_placement_groups(details, groups)
        return found + stray_processes(self._session_writers(), actors)

    def _session_writers(self) -> list[psutil.Process]:
        """Processes of the Ray that this config started on this machine; none where it started none."""
        ray = ray_of(self.config)
        state = ray.running() if isinstance(ray, LocalRay) else None
        return [] if state is None else processes.session_writers(Path(state.temp_dir), state.pid)


def is_whole(replica: ReplicaStatus) -> bool:
    """Whether a replica runs with all its stages."""
    return replica.state == "RUNNING" and all(stage.state == "ALIVE" for stage in replica.stages)


def _chosen(config: ClusterConfig, model: str | None) -> str:
    names = [entry.name for entry in config.models if entry.task == "generate"]
    if model is None and names:
        return names[0]
    if model not in names or model is None:
        raise UsageError(f"manta drill: model {model} does not generate text in this config; those that do: {names}")
    return model
