"""Processes of a Ray session: a directory in, those that write to it out, and the end of exactly those.

Ray's processes rename themselves, wipe their command lines, start sessions of their own, and some ignore SIGTERM.
What they cannot hide is that each writes its log under the session's directory. A reader (``tail -f``) is left alone.
"""

import os
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil


def session_writers(temp_dir: Path, pid: int | None = None) -> list[psutil.Process]:
    """Processes of the Ray sessions under ``temp_dir``; of the one that process ``pid`` began, where it is given.

    Ray names a session after the process of ``ray start``: ``session_<time>_<pid>``.
    """
    return writers_under(*temp_dir.glob(f"session_[0-9]*_{'*' if pid is None else pid}"))


def writers_under(*directories: Path) -> list[psutil.Process]:
    """Other processes of this user that hold a file under one of ``directories`` open for writing."""
    roots = tuple(f"{os.path.realpath(directory)}/" for directory in directories)
    if not roots:
        return []
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and _writes_to(process, roots)]


def _writes_to(process: psutil.Process, roots: tuple[str, ...]) -> bool:
    try:
        return any(file.path.startswith(roots) and getattr(file, "mode", "w") != "r" for file in process.open_files())
    except (psutil.Error, OSError):
        return False  # gone meanwhile, or of another user


def end(processes: Iterable[psutil.Process], *, patience_s: float) -> list[int]:
    """SIGTERM, wait up to ``patience_s``, SIGKILL what is left; returns the pids that still run after all of it."""
    remaining = _signalled(processes, signal.SIGTERM)
    _, remaining = psutil.wait_procs(remaining, timeout=patience_s)
    _, remaining = psutil.wait_procs(_signalled(remaining, signal.SIGKILL), timeout=5.0)
    return [process.pid for process in remaining]


def _signalled(processes: Iterable[psutil.Process], number: signal.Signals) -> Sequence[psutil.Process]:
    sent = []
    for process in processes:
        try:
            process.send_signal(number)  # psutil checks that the pid was not reused
        except psutil.NoSuchProcess:
            continue
        sent.append(process)
    return sent
