"""Progress for people: sentences, byte counts and application states in, lines or a live view on the terminal out."""

import sys
import time
from collections.abc import Sequence
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.control.wait import AppView
from cluster.units import format_bytes

_BYTES = "B"


class Report(Protocol):
    """Where the control path says what it does."""

    def say(self, sentence: str) -> None:
        """One sentence: what is done now."""

    def progress(self, label: str, done: int, total: int | None, unit: str) -> None:
        """A long step: ``done`` of ``total`` (None: unknown) in ``unit`` (``B``: bytes); over when they are equal."""

    def apps(self, views: Sequence[AppView]) -> None:
        """How far each application is."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def report_to(stream: TextIO | None = None) -> Report:
    """A live report on a terminal, lines anywhere else; standard error unless told otherwise."""
    stream = stream or sys.stderr
    return TerminalReport(Console(file=stream)) if stream.isatty() else LineReport(stream)


class LineReport:
    """One line per event, and per tenth of a long step; for logs, pipes and programs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._tenths: dict[str, int] = {}
        self._shown: dict[str, str] = {}

    def say(self, sentence: str) -> None:
        """Write the sentence."""
        self._stream.write(f"{sentence}\n")
        self._stream.flush()

    def progress(self, label: str, done: int, total: int | None, unit: str) -> None:
        """Write a line at the start, at every tenth, and at the end."""
        tenth = 0 if not total else done * 10 // total
        if self._tenths.get(label) != tenth:
            self._tenths[label] = tenth
            self.say(f"{label}: {_amount(done, unit)}" + ("" if total is None else f" of {_amount(total, unit)}"))

    def apps(self, views: Sequence[AppView]) -> None:
        """Write a line for each application whose state changed."""
        for view in views:
            line = f"{view.name}: {describe(view)}"
            if self._shown.get(view.name) != line:
                self._shown[view.name] = line
                self.say(line)

    def close(self) -> None:
        """Nothing to leave behind."""


class TerminalReport:
    """Progress bars and a table that is redrawn; at most one live display at a time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._live: Live | None = None
        self._began = time.monotonic()

    def say(self, sentence: str) -> None:
        """Print the sentence below what is finished."""
        self.close()
        self._console.print(f"[dim]{time.monotonic() - self._began:6.1f}s[/]  {escape(sentence)}", highlight=False)

    def progress(self, label: str, done: int, total: int | None, unit: str) -> None:
        """Move the bar of ``label``; a new one appears for a new label."""
        if self._bars is None:
            self.close()
            columns = (TextColumn("         {task.description}"), BarColumn(bar_width=20), _count_column(unit))
            self._bars = Progress(*columns, TimeElapsedColumn(), console=self._console)
            self._bars.start()
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(escape(label), total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)

    def apps(self, views: Sequence[AppView]) -> None:
        """Redraw the table of applications."""
        if self._live is None:
            self.close()
            self._live = Live(console=self._console, refresh_per_second=4, transient=False)
            self._live.start()
        self._live.update(_table(views))

    def close(self) -> None:
        """End the live display, leaving its last state on the screen."""
        if self._bars is not None:
            self._bars.stop()
        if self._live is not None:
            self._live.stop()
        self._bars, self._live = None, None
        self._tasks.clear()


def describe(view: AppView) -> str:
    """One application's state on one line, with its error or what it waits for."""
    replicas = f"{view.num_running} of {view.num_wanted} replicas run" if view.num_wanted else "no replica yet"
    starting = f", {view.num_starting} starting" if view.num_starting else ""
    trouble = "" if view.error is None else f"; last error: {view.error}"
    waiting = "" if view.waiting_for is None else f"; {view.waiting_for}"
    return f"{view.status.lower().replace('_', ' ')}, {replicas}{starting}{trouble}{waiting}"


def _table(views: Sequence[AppView]) -> Table:
    table = Table.grid(padding=(0, 2))
    for view in views:
        colour = "red" if view.failed else "green" if view.running else "yellow"
        table.add_row("       ", view.name, f"[{colour}]●[/]", escape(describe(view)))
    return table


def _count_column(unit: str) -> DownloadColumn | TextColumn:
    return DownloadColumn(binary_units=True) if unit == _BYTES else TextColumn("{task.completed:.0f} " + escape(unit))


def _amount(count: int, unit: str) -> str:
    return format_bytes(count) if unit == _BYTES else f"{count} {unit}"
