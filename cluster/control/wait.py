"""Waiting for applications: Serve's details over and over in, views of them out, until all run or one fails.

Ray answers a PUT with 200 and finds errors later: in building the application (its message), or in starting a replica
(its deployment's message, first while it still tries, then as DEPLOY_FAILED).
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.control.dashboard import Dashboard
from cluster.errors import ControlError
from cluster.plan.serve_app import ServeApp

_POLL_S = 0.5
_MAX_UNANSWERED = 5
"""Requests in a row that the dashboard may leave without an answer."""
_LOG_LINES = 20
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True, slots=True, kw_only=True)
class AppView:
    """One application while it comes up."""

    name: str
    status: str
    num_running: int
    num_starting: int
    num_wanted: int
    error: str | None
    """The replica's own last error, as soon as there is one; Serve may still be trying again."""
    waiting_for: str | None
    """Why nothing happens yet, in Serve's words."""

    @property
    def failed(self) -> bool:
        """Serve has given up."""
        return self.status == "DEPLOY_FAILED"

    @property
    def running(self) -> bool:
        """Up, with as many replicas as it should have."""
        return self.status == "RUNNING"


Show = Callable[[Sequence[AppView]], None]


def await_apps(dashboard: Dashboard, names: Sequence[str], show: Show, *, timeout_s: float) -> dict[str, str]:
    """Return when every application of ``names`` runs or Serve has given one up; ``show`` gets their views meanwhile.

    Returns the applications that failed, each with its replica's own error text; ControlError after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        details = patient_details(dashboard, deadline)
        views = [view(name, details["applications"].get(name)) for name in names]
        show(views)
        failed = [found for found in views if found.failed]
        if failed:
            return {found.name: _failure(dashboard, found, details) for found in failed}
        if all(found.running for found in views):
            return {}
        if time.monotonic() > deadline:
            late = ", ".join(f"{found.name} is {found.status}" for found in views if not found.running)
            raise ControlError(f"not running after {timeout_s:g} s: {late}; see `manta status` and `manta logs`")
        time.sleep(_POLL_S)


def await_gone(dashboard: Dashboard, names: Sequence[str], *, timeout_s: float) -> None:
    """Return when none of ``names`` is on the cluster any more; ControlError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while left := sorted(set(names) & patient_details(dashboard, deadline)["applications"].keys()):
        if time.monotonic() > deadline:
            raise ControlError(f"{', '.join(left)} did not stop within {timeout_s:g} s; see `manta status`")
        time.sleep(_POLL_S)


def patient_details(dashboard: Dashboard, deadline: float) -> dict[str, Any]:
    """Serve's details; a dashboard that is too busy to answer is asked again, a few times.

    ControlError when it does not answer then, or the time (of ``time.monotonic``) is past ``deadline``.
    """
    for _ in range(_MAX_UNANSWERED - 1):
        try:
            return dashboard.serve_details()
        except ControlError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)
    return dashboard.serve_details()


def longest_drain_s(apps: Iterable[ServeApp]) -> float:
    """How long the slowest of ``apps`` lets its requests finish before it stops, seconds."""
    deployments = [deployment for app in apps for deployment in app.get("deployments", [])]
    return max((deployment.get("graceful_shutdown_timeout_s", 0.0) for deployment in deployments), default=0.0)


def view(name: str, app: dict[str, Any] | None) -> AppView:
    """The view of one application of Serve's details; None when Serve does not list it yet."""
    if app is None:
        return AppView(
            name=name, status="NOT_STARTED", num_running=0, num_starting=0, num_wanted=0, error=None, waiting_for=None
        )
    deployments = list(app["deployments"].values())
    states = [replica["state"] for deployment in deployments for replica in deployment["replicas"]]
    messages = [text for text in (app["message"], *(deployment["message"] for deployment in deployments)) if text]
    errors = [text for text in map(error_text, messages) if text]
    waiting = [_plain(text) for text in messages if "have taken more than" in text]
    return AppView(
        name=name,
        status=app["status"],
        num_running=states.count("RUNNING"),
        num_starting=sum(state in ("STARTING", "UPDATING", "PENDING_MIGRATION") for state in states),
        num_wanted=sum(deployment["target_num_replicas"] or 0 for deployment in deployments),
        error=errors[-1] if errors else None,
        waiting_for=waiting[0].splitlines()[0].split(". ")[0] if waiting else None,
    )


def error_text(message: str) -> str | None:
    """The last exception of a message that contains a traceback, without its frames; None when there is no traceback.

    Everything after the last frame's source line: ``ValueError: ...`` and the lines that belong to it.
    """
    lines = _plain(message).splitlines()
    frames = [index for index, line in enumerate(lines) if line.lstrip().startswith('File "')]
    if not frames:
        return None
    after = frames[-1] + 1
    while after < len(lines) and (lines[after].startswith(" ") or not lines[after].strip()):
        after += 1
    return "\n".join(lines[after:]).strip() or None


def _plain(text: str) -> str:
    return _ESCAPES.sub("", text).strip()


def _failure(dashboard: Dashboard, found: AppView, details: dict[str, Any]) -> str:
    app = details["applications"][found.name]
    if found.error is not None:
        return f"{found.name} failed to start: {found.error}"
    tail = _dead_replica_log(dashboard, app)
    if tail is not None:
        return f"{found.name} failed to start; the end of its replica's log:\n{tail}"
    messages = [app["message"], *(deployment["message"] for deployment in app["deployments"].values())]
    return f"{found.name} failed to start: {' '.join(_plain(message) for message in messages if message)}"


def _dead_replica_log(dashboard: Dashboard, app: dict[str, Any]) -> str | None:
    for deployment in app["deployments"].values():
        for replica in reversed(deployment.get("recent_dead_replicas") or []):
            if replica.get("log_file_path") and replica.get("node_id"):
                file = {"node_id": replica["node_id"], "filename": replica["log_file_path"].lstrip("/")}
                try:
                    return dashboard.read_log(file, _LOG_LINES).strip() or None
                except ControlError:
                    continue  # the node may be gone with its log; Serve's own message is shown instead
    return None
