"""``python -m tests.bench recovery``: from the kill of a training worker to the next step of its run, part by part.

Two workers of a tiny model train on a Ray of their own; one is killed again and again.
"""

import argparse
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray
from rich.console import Console
from rich.table import Table

from cluster.runs.files import STATE
from cluster.runs.state import RunState, read_state
from tests.support.raylets import Raylets
from tests.support.tiny_run import tiny_run
from train_jobs.launch import NAMESPACE, launch, request_stop
from train_jobs.run_spec import RunSpec

GOAL_S = 15.0
_PATIENCE_S = 180.0


@dataclass(frozen=True)
class Recovery:
    """Seconds after the kill."""

    noticed_s: float
    restarted_s: float
    """A new group of workers was asked for."""
    stepped_s: float
    """Its first step is done."""


def wait_for(what: str, holds: Callable[[], bool]) -> float:
    """When it held, by the clock that the run's state is written with."""
    deadline = time.monotonic() + _PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {_PATIENCE_S:g} s")
        time.sleep(0.02)
    return time.time()


def kill_once(spec: RunSpec, steps: Path) -> Recovery:
    """Kill worker 1, and wait until the run goes on."""
    before = len(state_of(spec).attempts)
    monitor = ray.get_actor(f"{spec.job}/{spec.run_id}", namespace=NAMESPACE)
    killed = time.time()
    os.kill(ray.get(monitor.look.remote()).places[1].pid, signal.SIGKILL)
    wait_for("another attempt", lambda: len(state_of(spec).attempts) > before)
    ended, began = state_of(spec).attempts[before - 1].ended, state_of(spec).attempts[before].began
    size = steps.stat().st_size
    stepped = wait_for("another step", lambda: steps.stat().st_size > size)
    return Recovery((ended or began) - killed, began - killed, stepped - killed)


def state_of(spec: RunSpec) -> RunState:
    """As it is on disk."""
    return read_state(spec.run_dir)


def measure(folder: Path, repeat: int) -> list[Recovery]:
    """One run, killed ``repeat`` times."""
    spec = tiny_run(folder, "killed", steps=100_000, step_s=0.05)
    steps = folder / "notes" / "killed" / "seen.jsonl"
    run = threading.Thread(target=launch, args=(spec, lambda state: None))
    run.start()
    found = []
    try:
        wait_for("a first state", (spec.run_dir / STATE).exists)
        for _ in range(repeat):
            done = state_of(spec).step
            wait_for("a checkpoint", lambda done=done: state_of(spec).step >= done + 10)  # type: ignore[misc]
            found.append(kill_once(spec, steps))
    finally:
        request_stop(spec)
        run.join()
    return found


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.bench recovery")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    raylets = Raylets()
    try:
        raylets.start_head(2, train_slot=2)
        raylets.connect()
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), arguments.repeat)
    finally:
        raylets.stop()
    Console(width=100).print(table(found))


def table(found: list[Recovery]) -> Table:
    """A row for each kill, and the medians."""
    shown = Table(title="seconds after a worker was killed", title_justify="left")
    for heading in ("", "noticed", "workers asked for", "next step done"):
        shown.add_column(heading, justify="right")
    for number, one in enumerate(found, 1):
        shown.add_row(str(number), *(f"{value:.1f}" for value in (one.noticed_s, one.restarted_s, one.stepped_s)))
    medians = [
        statistics.median(getattr(one, name) for one in found) for name in ("noticed_s", "restarted_s", "stepped_s")
    ]
    shown.add_row("median", *(f"{value:.1f}" for value in medians))
    shown.caption = f"goal: a next step within {GOAL_S:g} s"
    return shown


if __name__ == "__main__":
    main()
