"""What a cluster may not keep: Serve's, Ray's and the system's own lists in, whatever belongs to no replica out."""

from collections.abc import Mapping, Sequence
from typing import Any

import psutil

STAGE_TITLE = "ray::StageActor"
REPLICA_TITLE = "ray::ServeReplica:"
"""How Ray names the processes of such actors; what follows is the application, or what the process does now."""


def listed_replicas(details: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(application, replica id) of everything that Serve lists, in any state."""
    return {
        (name, replica["replica_id"])
        for name, app in details["applications"].items()
        for deployment in app["deployments"].values()
        for replica in deployment["replicas"]
    }


def extra_actors(details: Mapping[str, Any], actors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Living replica and stage actors that belong to no listed replica."""
    listed = listed_replicas(details)
    living = [actor["name"] or "" for actor in actors if actor["state"] != "DEAD"]
    owners = {name: owner for name in living if (owner := _owner(name)) is not None}
    return [f"actor {name}" for name, owner in sorted(owners.items()) if owner not in listed]


def extra_placement_groups(details: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Placement groups of replicas that are not listed any more."""
    listed = listed_replicas(details)
    names = [group["name"] or "" for group in groups if group["state"] != "REMOVED"]
    owners = {name: owner for name in names if (owner := _owner(name)) is not None}
    return [f"placement group {name}" for name, owner in sorted(owners.items()) if owner not in listed]


def stray_processes(writers: Sequence[psutil.Process], actors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Processes of replicas and stages, among those of a Ray session, that outlived their actors."""
    known = {actor["pid"] for actor in actors if actor["state"] != "DEAD"}
    titles = {writer.pid: _title(writer) for writer in writers}
    strays = [
        pid for pid, title in titles.items() if title.startswith((STAGE_TITLE, REPLICA_TITLE)) and pid not in known
    ]
    return [f"process {pid} ({titles[pid]}) without an actor" for pid in sorted(strays)]


def _title(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""


def _owner(name: str) -> tuple[str, str] | None:
    """(application, replica id) that an actor or placement group is named after; None for any other name."""
    if name.startswith("SERVE_REPLICA::"):
        app, _, replica = name.removeprefix("SERVE_REPLICA::").split("#")
        return app, replica
    if name.startswith("manta:"):
        _, app, replica, *_ = name.split(":")
        return app, replica
    return None
