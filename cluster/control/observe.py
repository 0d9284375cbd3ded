"""What runs now: the dashboard's JSON in, ``Observed`` for the diff and a status tree for people and programs out."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import psutil

from cluster.control.dashboard import Dashboard
from cluster.plan.diff import Observed, ObservedApp
from cluster.plan.serve_app import is_own
from cluster.plan.types import PlanModel

_STAGE_NAME = re.compile(r"manta:(?P<app>[^:]+):(?P<replica>[^:]+):stage-(?P<index>[0-9]+)")


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
    http = details.get("http_options") or {}
    address = (http["host"], http["port"]) if "port" in http and details.get("controller_info") else None
    staying = {name: app for name, app in details["applications"].items() if app["status"] != "DELETING"}
    apps = {name: _observed_app(name, app) for name, app in staying.items()}
    return Observed(ray_running=True, http_address=address, apps=apps)


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
    return status_from(name, dashboard.url, details, dashboard.actors() if details["applications"] else [])


def status_from(
    name: str, dashboard_url: str, details: dict[str, Any], actors: Sequence[dict[str, Any]]
) -> ClusterStatus:
    """The status tree from Serve's details and the dashboard's actors."""
    own = {
        app["name"]: app for app in details["applications"].values() if is_own(app.get("deployed_app_config") or {})
    }
    http = details.get("http_options") or {}
    by_id = {actor["actorId"]: actor for actor in actors}
    stages = stage_actors(actors)
    models: dict[str, list[VersionStatus]] = {}
    tasks: dict[str, str] = {}
    gateway = None
    for app in own.values():
        args = app["deployed_app_config"]["args"]
        version = _version_status(app, args, by_id, stages)
        if "model" not in args:
            gateway = version
            continue
        models.setdefault(args["model"], []).append(version)
        tasks[args["model"]] = args["task"]
    return ClusterStatus(
        name=name,
        ray="running",
        dashboard=dashboard_url,
        url=f"http://{http['host']}:{http['port']}" if gateway is not None else None,
        gateway=gateway,
        models=tuple(
            ModelStatus(name=model, task=tasks[model], versions=tuple(versions)) for model, versions in models.items()
        ),
    )


def stage_actors(actors: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The newest actor of each (application, replica, stage index): a replaced stage leaves a dead one behind."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for actor in sorted(actors, key=lambda actor: actor.get("startTime") or 0):
        match = _STAGE_NAME.fullmatch(actor.get("name") or "")
        if match is None:
            continue
        key = (match["app"], match["replica"], int(match["index"]))
        if actor["state"] != "DEAD" or key not in found:
            found[key] = actor
    return found


def _version_status(
    app: dict[str, Any],
    args: dict[str, Any],
    by_id: dict[str, dict[str, Any]],
    stages: dict[tuple[str, str, int], dict[str, Any]],
) -> VersionStatus:
    deployments = list(app["deployments"].values())
    messages = [app["message"], *(deployment["message"] for deployment in deployments)]
    return VersionStatus(
        app=app["name"],
        version=args.get("version", ""),
        status=app["status"],
        message="\n".join(message for message in messages if message),
        target_replicas=sum(deployment["target_num_replicas"] or 0 for deployment in deployments),
        replicas=tuple(
            _replica_status(app["name"], replica, args, by_id.get(replica["actor_id"] or "", {}), stages)
            for replica in replicas_of(app)
        ),
    )


def _replica_status(
    app: str,
    replica: dict[str, Any],
    args: dict[str, Any],
    actor: dict[str, Any],
    stages: dict[tuple[str, str, int], dict[str, Any]],
) -> ReplicaStatus:
    pid = replica.get("pid")
    return ReplicaStatus(
        id=replica["replica_id"],
        state=replica["state"],
        node=replica.get("node_ip"),
        pid=pid,
        resident_bytes=_resident_bytes(actor, pid),
        log_file=replica.get("log_file_path"),
        node_id=replica.get("node_id"),
        stages=tuple(
            _stage_status(stage, stages.get((app, replica["replica_id"], stage["index"])))
            for stage in args.get("stages", [])
        ),
    )


def _stage_status(stage: dict[str, Any], actor: dict[str, Any] | None) -> StageStatus:
    layers = (stage["layer_start"], stage["layer_stop"])
    if actor is None:
        return StageStatus(
            index=stage["index"], layers=layers, node=None, pid=None, resident_bytes=None, state="MISSING"
        )
    pid = actor.get("pid") or None
    return StageStatus(
        index=stage["index"],
        layers=layers,
        node=(actor.get("address") or {}).get("ipAddress") or None,
        pid=pid,
        resident_bytes=_resident_bytes(actor, pid),
        state=actor["state"],
    )


def _resident_bytes(actor: dict[str, Any], pid: int | None) -> int | None:
    """The process's own reading where it is on this machine, else the dashboard's, which is some seconds old."""
    if pid is None:
        return None
    if (actor.get("address") or {}).get("ipAddress") == "127.0.0.1":
        try:
            return int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:
            return None
    memory = (actor.get("processStats") or {}).get("memoryInfo") or {}
    return memory.get("rss")
