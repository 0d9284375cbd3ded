"""What the jobs of a config are at: the config, Ray's submissions and runs on disk in, one row for each job out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.config.schema import ClusterConfig
from cluster.control.jobs import Submission, newest
from cluster.errors import DataError
from cluster.plan.jobs import plan_jobs
from cluster.runs.files import MANIFEST, data_directory, run_directories, storage_directory
from cluster.runs.state import RunState, read_state
from cluster.units import format_duration

_NEVER = "never run"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """One job. ``state`` is that of its last submission, or of its last run where Ray knows of none."""

    job: str
    kind: str
    task: str
    state: str
    submission: str | None
    began_s: float | None
    """Unix time."""
    ended_s: float | None
    step: int | None
    num_steps: int | None
    published: str | None
    """Registry version that came of it."""
    message: str | None
    """What went wrong, or what else there is to say."""


def job_statuses(config: ClusterConfig, found: Sequence[Submission]) -> list[JobStatus]:
    """Every job of the config, in its order; ``found`` are its cluster's submissions, oldest first."""
    if not config.jobs:
        return []
    storage = storage_directory(config.storage_root)
    statuses = [
        _status(plan.name, plan.kind, plan.task, newest(found, plan.name), _last_run(storage, plan.name))
        for plan in plan_jobs(config)
    ]
    return [_with_data(each, storage) for each in statuses]


def submitted_jobs(found: Sequence[Submission]) -> list[JobStatus]:
    """Every job that was submitted to a cluster, by whatever config; what it makes is not known here."""
    last = {(each.cluster, each.job): each for each in found}
    return [_status(f"{cluster}/{job}", "", "", each, None) for (cluster, job), each in last.items()]


def _with_data(status: JobStatus, storage: Path) -> JobStatus:
    """A prepare job that never ran by itself may have been done by the job that needed its data."""
    if status.state == _NEVER and any(data_directory(storage, status.job).glob(f"*/{MANIFEST}")):
        return replace(status, state="prepared")
    return status


def _last_run(storage: Path, job: str) -> RunState | None:
    try:
        directories = run_directories(storage, job)
        return read_state(directories[0]) if directories else None
    except (OSError, DataError):
        return None  # a run directory that this machine cannot read says nothing


def _status(job: str, kind: str, task: str, last: Submission | None, run: RunState | None) -> JobStatus:
    state = _NEVER if last is None else last.state.lower()
    if last is None and run is not None:
        state = "interrupted" if run.status == "running" else run.status
    began = last.began_s if last is not None else run.began if run is not None else None
    failed = last is not None and last.state == "FAILED"
    return JobStatus(
        job=job,
        kind=kind,
        task=task,
        state=state,
        submission=None if last is None else last.id,
        began_s=began,
        ended_s=last.ended_s if last is not None else None,
        step=None if run is None else run.step,
        num_steps=None if run is None else run.num_steps,
        published=None if run is None else run.published,
        message=_message(last, run) if failed or last is None else None,
    )


def _message(last: Submission | None, run: RunState | None) -> str | None:
    if run is not None and run.error:
        return run.error
    return last.message or None if last is not None else None


_COLOURS = {"running": "yellow", "pending": "yellow", "succeeded": "green", "finished": "green", "failed": "red"}


def jobs_view(cluster: str, statuses: Sequence[JobStatus]) -> RenderableType:
    """One row for each job, and below what went wrong."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("job", "kind", "state", "began", "took", "steps", "published"):
        table.add_column(name, justify="right" if name in ("took", "steps") else "left", overflow="fold")
    for each in statuses:
        state = Text(each.state, style=_COLOURS.get(each.state, ""))
        table.add_row(
            each.job,
            each.kind,
            state,
            _when(each.began_s),
            _took(each),
            _steps(each),
            each.published or "",
        )
    wrong = [Text(f"{each.job}: {_last_line(each.message)}", style="red") for each in statuses if each.message]
    return Group(Text(f"Jobs of {cluster}", style="bold"), table, *wrong)


def _when(seconds: float | None) -> str:
    if seconds is None:
        return ""
    then = time.localtime(seconds)
    return time.strftime("%H:%M" if then[:3] == time.localtime()[:3] else "%m-%d", then)


def _took(each: JobStatus) -> str:
    if each.began_s is None or each.submission is None:
        return ""
    return format_duration((each.ended_s or time.time()) - each.began_s)


def _steps(each: JobStatus) -> str:
    if each.step is None or each.kind != "train":
        return ""
    return f"{each.step}" if each.num_steps is None else f"{each.step}/{each.num_steps}"


def _last_line(message: str) -> str:
    lines = [line for line in message.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
