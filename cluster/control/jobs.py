"""Jobs on a Ray cluster: a job of the config in, a submission to Ray's job server out; its state, its log, its end.

A submission is named ``manta-<cluster>-<job>-<number>``: Ray never takes a name twice, and numbers count attempts.
The config travels as a package of one file, so that the cluster runs what was submitted, wherever it is.
"""

import hashlib
import io
import re
import shlex
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.config.nodes import LocalProvider, UriCode
from cluster.config.schema import ClusterConfig
from cluster.control.code import code_digest
from cluster.control.dashboard import Dashboard
from cluster.errors import ControlError
from cluster.plan.jobs import JobPlan

JobState = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]

STOP_PATIENCE_S = 600
"""A job that is stopped has this long to save a checkpoint; then Ray kills it."""
_POLL_S = 0.5
_CLUSTER, _JOB = "manta_cluster", "manta_job"
"""Metadata that a submission carries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One submission of a job, as Ray's job server tells it."""

    id: str
    cluster: str
    job: str
    number: int
    state: JobState
    message: str
    began_s: float | None
    """Unix time."""
    ended_s: float | None

    @property
    def active(self) -> bool:
        """Whether it has not ended."""
        return self.state in ("PENDING", "RUNNING")


def submissions(dashboard: Dashboard, cluster: str | None = None) -> list[Submission]:
    """Submissions of Manta's jobs, oldest first; those of one cluster's config, where it is named."""
    found = [_read(entry) for entry in dashboard.jobs() if _is_own(entry, cluster)]
    return sorted(found, key=lambda each: (each.cluster, each.job, each.number))


def newest(found: Sequence[Submission], job: str) -> Submission | None:
    """The last submission of a job."""
    return max((each for each in found if each.job == job), key=lambda each: each.number, default=None)


def submit(dashboard: Dashboard, config: ClusterConfig, path: Path, plan: JobPlan) -> str:
    """Submit a job of the config, which was read from ``path``; the submission's id.

    ControlError when an earlier submission of it has not ended.
    """
    last = newest(submissions(dashboard, config.name), plan.name)
    if last is not None and last.active:
        raise ControlError(
            f"job {plan.name} of {config.name} is {last.state.lower()} already, as {last.id}; follow it with "
            f"`manta train {path} {plan.name} --follow`, or end it with `manta stop {path} {plan.name}`"
        )
    number = 1 if last is None else last.number + 1
    body = submission(config, path.name, plan, number, package=_upload(dashboard, path))
    dashboard.submit_job(body)
    return str(body["submission_id"])


def submission(config: ClusterConfig, file_name: str, plan: JobPlan, number: int, *, package: str) -> dict[str, Any]:
    """What Ray's job server is told; ``package`` is the URI of a zip that holds the config as ``file_name``."""
    code = config.cluster.code
    python = sys.executable if isinstance(config.cluster.provider, LocalProvider) else "python"
    command = [python, "-m", "train_jobs", "run", file_name, plan.name, "--code-digest", code_digest()]
    environment: dict[str, Any] = {
        "working_dir": package,
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_PATIENCE_S)},  # by default 3: too short to save anything
    }
    if isinstance(code, UriCode):
        environment["py_modules"] = [code.uri]
    return {
        "entrypoint": f"exec {shlex.join(command)}",
        "submission_id": f"manta-{config.name}-{plan.name}-{number}",
        "runtime_env": environment,
        "metadata": {_CLUSTER: config.name, _JOB: plan.name},
    }


def stop(dashboard: Dashboard, found: Submission, *, timeout_s: float = STOP_PATIENCE_S + 30.0) -> Submission:
    """Tell a submission to save and stop, and wait until it has ended; ControlError when it does not."""
    dashboard.stop_job(found.id)
    deadline = time.monotonic() + timeout_s
    while True:
        now = _read(dashboard.job(found.id))
        if not now.active:
            return now
        if time.monotonic() > deadline:
            raise ControlError(f"{found.id} did not end within {timeout_s:g} s; see its log in the Ray dashboard")
        time.sleep(_POLL_S)


def state_of(dashboard: Dashboard, submission_id: str) -> Submission:
    """A submission as it is now."""
    return _read(dashboard.job(submission_id))


def _upload(dashboard: Dashboard, path: Path) -> str:
    """The URI of a package with the file in it; equal bytes are the same package."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(zipfile.ZipInfo(path.name, date_time=(1980, 1, 1, 0, 0, 0)), path.read_bytes())
    name = f"_ray_pkg_{hashlib.sha256(content.getvalue()).hexdigest()[:32]}.zip"
    dashboard.put_package(name, content.getvalue())
    return f"gcs://{name}"


def _is_own(entry: dict[str, Any], cluster: str | None) -> bool:
    metadata = entry.get("metadata") or {}
    return _JOB in metadata and bool(entry.get("submission_id")) and cluster in (None, metadata.get(_CLUSTER))


def _read(entry: dict[str, Any]) -> Submission:
    number = re.search(r"-([0-9]+)$", entry["submission_id"])
    return Submission(
        id=entry["submission_id"],
        cluster=entry["metadata"].get(_CLUSTER, ""),
        job=entry["metadata"][_JOB],
        number=int(number[1]) if number else 0,
        state=entry["status"],
        message=entry.get("message") or "",
        began_s=_seconds(entry.get("start_time")),
        ended_s=_seconds(entry.get("end_time")),
    )


def _seconds(milliseconds: int | None) -> float | None:
    return None if not milliseconds else milliseconds / 1000
