"""What runs now: the dashboard's JSON in, ``Observed`` for the diff and a status tree for people and programs out."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import psutil

from cluster.control.dashboard import Dashboard
from cluster.plan.diff import Observed, ObservedApp
from cluster.plan.serve_app import ServeProxies, is_own
from cluster.plan.types import PlanModel

_STAGE_NAME = re.compile(r"manta:(?P<app>[^:]+):(?P<replica>[^:]+):stage-(?P<index>[0-9]+)(?::[0-9]+)?")

_THIS_MACHINE = "127.0.0.1"
"""A node has this address only in a Ray of the local provider."""


class StageStatus(PlanModel):
    """One stage of a running replica; sizes in bytes, None where the process is not seen."""

    index: int
    layers: tuple[int, int]
    """Half-open range of layers."""
    node: str | None
    """IP address of its node."""
    pid: int | None
    resident_bytes: int | None
    state: str
    """Ray's word for the actor: ALIVE, PENDING_CREATION, RESTARTING, DEAD; MISSING when there is none."""


class ReplicaStatus(PlanModel):
    """One replica of an application."""

    id: str
    state: str
    node: str | None
    pid: int | None
    resident_bytes: int | None
    log_file: str | None
    node_id: str | None
    stages: tuple[StageStatus, ...]


class VersionStatus(PlanModel):
    """One version of a model: its application and replicas."""

    app: str
    version: str
    status: str
    message: str
    target_replicas: int
    replicas: tuple[ReplicaStatus, ...]


class ModelStatus(PlanModel):
    """One model, with every version that is deployed."""

    name: str
    task: str
    versions: tuple[VersionStatus, ...]


class ClusterStatus(PlanModel):
    """Everything that Manta runs on one cluster."""

    name: str
    ray: str
    """``running`` or ``stopped``."""
    dashboard: str | None
    url: str | None
    """Base URL of the HTTP endpoint, None while there is none."""
    gateway: VersionStatus | None
    models: tuple[ModelStatus, ...]


def observe(dashboard: Dashboard | None) -> Observed:
    """What runs on the cluster behind ``dashboard``; None when Ray does not run."""
    if dashboard is None:
        return Observed(ray_running=False)
    return observed_from(dashboard.serve_details())


def observed_from(details: dict[str, Any]) -> Observed:
    """Serve's own account of itself, as far as the diff needs it."""
    staying = {name: app for name, app in details["applications"].items() if app["status"] != "DELETING"}
    apps = {name: _observed_app(name, app) for name, app in staying.items()}
    return Observed(ray_running=True, proxies=_proxies(details), apps=apps)


def _proxies(details: dict[str, Any]) -> ServeProxies | None:
    """Serve's own HTTP settings, as a PUT has to repeat them; None while Serve does not run."""
    if not details.get("controller_info"):
        return None
    http = details.get("http_options") or {}
    return {
        "proxy_location": details["proxy_location"],
        "http_options": {key: http[key] for key in ("host", "port") if key in http},
    }


def _observed_app(name: str, app: dict[str, Any]) -> ObservedApp:
    running = sum(replica["state"] == "RUNNING" for replica in replicas_of(app))
    config = app.get("deployed_app_config") or {"name": name, "route_prefix": app.get("route_prefix")}
    return ObservedApp(
        name=name,
        status=app["status"],
        config=config,
        num_running_replicas=running,
        declarative=app.get("source") == "declarative",
    )


def replicas_of(app: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Replicas of every deployment of a Serve application."""
    return (replica for deployment in app["deployments"].values() for replica in deployment["replicas"])


def cluster_status(name: str, dashboard: Dashboard | None) -> ClusterStatus:
    """The status tree of the cluster behind ``dashboard``; None when Ray does not run."""
    if dashboard is None:
        return ClusterStatus(name=name, ray="stopped", dashboard=None, url=None, gateway=None, models=())
    details = dashboard.serve_details()
    if not details["applications"]:
        return status_from(name, dashboard.url, details, Processes())
    nodes = {node["node_id"]: node["node_ip"] for node in dashboard.nodes()}
    here = all(ip == _THIS_MACHINE for ip in nodes.values())
    reported = {} if here else dashboard.resident_bytes()
    return status_from(name, dashboard.url, details, Processes(dashboard.actors(), nodes, reported))


class Processes:
    """Actors of the cluster, their nodes and their memory, looked up by id or by stage name."""

    def __init__(
        self,
        actors: Sequence[dict[str, Any]] = (),
        nodes: Mapping[str, str] | None = None,
        reported_bytes: Mapping[str, int] | None = None,
    ) -> None:
        self.stages = stage_actors(actors)
        self._nodes = nodes or {}
        self._reported_bytes = reported_bytes or {}

    def node_of(self, node_id: str | None) -> str | None:
        """IP address of a node."""
        return self._nodes.get(node_id or "")

    def resident_bytes(self, node_id: str | None, pid: int | None, actor_id: str | None) -> int | None:
        """The process's own reading where it is on this machine, else what its node's agent reported last."""
        if pid is None:
            return None
        if self.node_of(node_id) == _THIS_MACHINE:
            try:
                return int(psutil.Process(pid).memory_info().rss)
            except psutil.Error:
                return None
        return self._reported_bytes.get(actor_id or "")


def stage_actors(actors: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The actor of each (application, replica, stage index); the living one where a replaced one is still listed."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for actor in actors:
        match = _STAGE_NAME.fullmatch(actor.get("name") or "")
        if match is None:
            continue
        key = (match["app"], match["replica"], int(match["index"]))
        if actor["state"] != "DEAD" or key not in found:
            found[key] = actor
    return found


def status_from(name: str, dashboard_url: str, details: dict[str, Any], processes: Processes) -> ClusterStatus:
    """The status tree from Serve's details and the cluster's processes."""
    own = [app for app in details["applications"].values() if is_own(app.get("deployed_app_config") or {})]
    models: dict[str, list[VersionStatus]] = {}
    tasks: dict[str, str] = {}
    gateway = url = None
    for app in own:
        args = app["deployed_app_config"]["args"]
        version = _version_status(app, args, processes)
        if "model" not in args:
            gateway = version
            url = f"http://{args['http_host']}:{args['http_port']}" if "http_port" in args else None
            continue
        models.setdefault(args["model"], []).append(version)
        tasks[args["model"]] = args["task"]
    return ClusterStatus(
        name=name,
        ray="running",
        dashboard=dashboard_url,
        url=url,
        gateway=gateway,
        models=tuple(
            ModelStatus(name=model, task=tasks[model], versions=tuple(versions)) for model, versions in models.items()
        ),
    )


def _version_status(app: dict[str, Any], args: dict[str, Any], processes: Processes) -> VersionStatus:
    deployments = list(app["deployments"].values())
    messages = [app["message"], *(deployment["message"] for deployment in deployments)]
    return VersionStatus(
        app=app["name"],
        version=args.get("version", ""),
        status=app["status"],
        message="\n".join(message for message in messages if message),
        target_replicas=sum(deployment["target_num_replicas"] or 0 for deployment in deployments),
        replicas=tuple(_replica_status(app["name"], replica, args, processes) for replica in replicas_of(app)),
    )


def _replica_status(app: str, replica: dict[str, Any], args: dict[str, Any], processes: Processes) -> ReplicaStatus:
    pid, node_id = replica.get("pid"), replica.get("node_id")
    stages = args.get("stages", [])
    actors = [processes.stages.get((app, replica["replica_id"], stage["index"])) for stage in stages]
    return ReplicaStatus(
        id=replica["replica_id"],
        state=replica["state"],
        node=replica.get("node_ip"),
        pid=pid,
        resident_bytes=processes.resident_bytes(node_id, pid, replica.get("actor_id")),
        log_file=replica.get("log_file_path"),
        node_id=node_id,
        stages=tuple(_stage_status(stage, actor, processes) for stage, actor in zip(stages, actors, strict=True)),
    )


def _stage_status(stage: dict[str, Any], actor: dict[str, Any] | None, processes: Processes) -> StageStatus:
    node_id = None if actor is None else actor["node_id"]
    pid = (None if actor is None else actor["pid"]) or None
    return StageStatus(
        index=stage["index"],
        layers=(stage["layer_start"], stage["layer_stop"]),
        node=processes.node_of(node_id),
        pid=pid,
        resident_bytes=processes.resident_bytes(node_id, pid, None if actor is None else actor["actor_id"]),
        state="MISSING" if actor is None else actor["state"],
    )
