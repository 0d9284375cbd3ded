"""What stuck workers are doing: process ids of one node in, a file of stacks for each out, and their end."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_TIMEOUT_S = 30.0


def dump_and_end(pids: Mapping[str, int], folder: Path) -> list[Path]:
    """Write ``<name>.txt`` for each process of this node, by name, then kill all of them; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, pid in pids.items():
        path = folder / f"{name}.txt"
        path.write_text(stacks_of(pid))
        written.append(path)
    for pid in pids.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return written


def stacks_of(pid: int) -> str:
    """Python stacks of every thread of a process, or why there are none."""
    beside = Path(sys.executable).with_name("py-spy")
    command = str(beside) if beside.is_file() else shutil.which("py-spy")
    if command is None:
        return "py-spy is not installed on this node; it comes with ray[default]\n"
    try:
        done = subprocess.run(  # noqa: S603 (a process id of our own)
            [command, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"py-spy did not read process {pid} within {_TIMEOUT_S:g} s\n"
    if done.returncode:
        return (
            f"py-spy could not read process {pid}: {done.stderr.strip()}\n"
            "containers need the capability SYS_PTRACE, machines kernel.yama.ptrace_scope=0\n"
        )
    return done.stdout
