"""Logs of a model: its name in, lines of its replicas and stages out, read where they run through the dashboard."""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.control.dashboard import Dashboard
from cluster.control.observe import replicas_of, stage_actors
from cluster.errors import ControlError
from cluster.plan.serve_app import GATEWAY_APP, is_own


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFile:
    """One file on one node, and the short name that its lines are shown under."""

    label: str
    query: dict[str, str]
    """What the dashboard's log API finds it by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of one file."""

    label: str
    text: str


def log_files(dashboard: Dashboard, model: str) -> list[LogFile]:
    """Files of the replicas and stages of ``model`` (or ``gateway``, or an application's name): the living ones.

    Where none lives, those that died last, because their ends say why.

    Raises ControlError when nothing of that name is deployed, naming what is.
    """
    apps = dashboard.serve_details()["applications"]
    own = {name: app for name, app in apps.items() if is_own(app.get("deployed_app_config") or {})}
    chosen = [app for name, app in own.items() if model in (name, _model_of(app))]
    if not chosen:
        known = ", ".join(sorted({_model_of(app) for app in own.values()})) or "nothing"
        raise ControlError(f"{model} is not deployed at {dashboard.url}; deployed: {known}")
    files = [_replica_file(app["name"], replica) for app in chosen for replica in _living_or_dead(app)]
    shown = {(app["name"], replica["replica_id"]) for app in chosen for replica in _living_or_dead(app)}
    stages = sorted(stage_actors(dashboard.actors()).items())
    files += [_stage_file(key, actor) for key, actor in stages if key[:2] in shown and actor["pid"]]
    return [file for file in files if file is not None]


def read_logs(dashboard: Dashboard, files: Sequence[LogFile], num_lines: int) -> Iterator[LogLine]:
    """The last ``num_lines`` lines of every file, file by file; a file that is gone is said to be."""
    for file in files:
        try:
            text = dashboard.read_log(file.query, num_lines)
        except ControlError as error:
            text = f"(cannot be read: {error})"
        yield from (LogLine(label=file.label, text=line) for line in text.splitlines() if not _is_marker(line))


def follow_logs(dashboard: Dashboard, files: Sequence[LogFile], num_lines: int) -> Iterator[LogLine]:
    """The last lines of every file and then whatever is added, as it comes; ends when every file has ended."""
    lines: queue.Queue[LogLine | None] = queue.Queue(maxsize=10_000)
    for file in files:
        threading.Thread(target=_follow, args=(dashboard, file, num_lines, lines), daemon=True).start()
    num_open = len(files)
    while num_open:
        line = lines.get()
        if line is None:
            num_open -= 1
        else:
            yield line


def _follow(dashboard: Dashboard, file: LogFile, num_lines: int, lines: "queue.Queue[LogLine | None]") -> None:
    rest = b""
    try:
        for chunk in dashboard.follow_log(file.query, num_lines):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                text = line.decode(errors="replace")
                if not _is_marker(text):
                    lines.put(LogLine(label=file.label, text=text))
    except ControlError as error:
        lines.put(LogLine(label=file.label, text=f"(no more: {error})"))
    finally:
        lines.put(None)


def _model_of(app: dict[str, Any]) -> str:
    return str(app["deployed_app_config"]["args"].get("model", GATEWAY_APP))


def _living_or_dead(app: dict[str, Any]) -> list[dict[str, Any]]:
    dead = [replica for deployment in app["deployments"].values() for replica in deployment["recent_dead_replicas"]]
    return list(replicas_of(app)) or dead


def _replica_file(app: str, replica: dict[str, Any]) -> LogFile | None:
    if not replica.get("log_file_path") or not replica.get("node_id"):
        return None  # it has not started yet
    query = {"node_id": replica["node_id"], "filename": replica["log_file_path"].lstrip("/")}
    return LogFile(label=f"{app}/{replica['replica_id']}", query=query)


def _stage_file(key: tuple[str, str, int], actor: dict[str, Any]) -> LogFile:
    app, replica, index = key
    return LogFile(label=f"{app}/{replica}/stage-{index}", query={"actor_id": actor["actor_id"], "suffix": "err"})


def _is_marker(line: str) -> bool:
    """Ray writes such lines to tell its own log monitor whose file it is."""
    return line.startswith((":job_id:", ":actor_name:", ":task_name:"))
