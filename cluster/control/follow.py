"""The log of a running job in, lines and a bar of progress on the terminal out, until the job has ended."""

import asyncio
import sys
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from cluster.control.dashboard import Dashboard
from cluster.control.jobs import Submission, state_of
from cluster.runs.progress import Progress, read_progress
from cluster.units import format_duration

_SETTLE_POLLS = 40
_SETTLE_S = 0.25
"""The log ends a moment before the state says so."""


class FollowView(Protocol):
    """Where the lines of a log go."""

    def show(self, line: str) -> None:
        """One line."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def view_on(stream: TextIO | None = None) -> FollowView:
    """A bar below the lines on a terminal, lines alone anywhere else; standard error unless told otherwise."""
    stream = stream or sys.stderr
    return TerminalView(Console(file=stream)) if stream.isatty() else LineView(stream)


class LineView:
    """Every line as it is."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, line: str) -> None:
        """Write the line."""
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing to leave behind."""


class TerminalView:
    """Lines that tell progress move a bar; all others scroll by above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[numbers]}"))
        self._bars = Bars(*columns, console=console, expand=True)
        self._task: TaskID | None = None

    def show(self, line: str) -> None:
        """Move the bar, or print the line above it."""
        progress = read_progress(line)
        if progress is None:
            self._console.print(line, markup=False, highlight=False)
            return
        if self._task is None:
            self._bars.start()
            self._task = self._bars.add_task("", numbers="")
        self._bars.update(
            self._task,
            completed=progress.step,
            total=progress.num_steps,
            description=f"step {progress.step}/{progress.num_steps or '?'}",
            numbers=describe(progress),
        )

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._task is not None:
            self._bars.stop()


def describe(progress: Progress) -> str:
    """The numbers behind the bar: loss, speed, time left."""
    parts = [] if progress.loss is None else [f"loss {progress.loss:.4g}"]
    if progress.tokens_per_s is not None:
        parts.append(f"{_short(progress.tokens_per_s)} tokens/s")
    if progress.left_s is not None:
        parts.append(f"{format_duration(progress.left_s)} left")
    return "  ".join(parts)


def _short(count: float) -> str:
    return f"{count:.0f}" if count < 10_000 else f"{count / 1000:.0f}k"


def follow(dashboard: Dashboard, submission_id: str, view: FollowView) -> Submission:
    """Show the log of a submission until it ends; how it ended. Ctrl-C ends the showing, not the job."""
    try:
        return asyncio.run(_follow(dashboard, submission_id, view))
    finally:
        view.close()


async def _follow(dashboard: Dashboard, submission_id: str, view: FollowView) -> Submission:
    async for line in dashboard.tail_job(submission_id):
        view.show(line)
    found = state_of(dashboard, submission_id)
    for _ in range(_SETTLE_POLLS):
        if not found.active:
            break
        await asyncio.sleep(_SETTLE_S)
        found = state_of(dashboard, submission_id)
    return found
