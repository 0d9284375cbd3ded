"""The directory of a run: who and what in, files that people and later attempts read out.

    <storage>/runs/<job>/<run id>/
      spec.json      what was asked for, as resolved
      state.json     where the run stands (RunState)
      log.jsonl      one line per step and per evaluation
      tensorboard/   the same as curves
      checkpoints/   step-<n>/, whole when COMMITTED is in it
      stacks/        what stuck workers were doing
"""

import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from cluster.durable import write_durably
from cluster.errors import PlanError
from train_jobs.trainer import committed

Phase = Literal["waiting", "running", "finished", "failed", "stopped"]


class RunState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a run stands; ``updated`` and ``started`` are Unix times, seconds.

    A driver that dies leaves the last state it wrote: one that says ``running`` and is not updated is of a dead run.
    """

    job: str
    run_id: str
    phase: Phase
    """``waiting`` is for room in the cluster; ``stopped`` runs and ``failed`` ones go on when submitted again."""
    reason: str | None = None
    """Why it waits, failed, was stopped or was not published."""
    step: int = 0
    of: int | None = None
    """Steps of the whole run; None until a worker has said so."""
    eta_s: float | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    attempt: int = 0
    """Groups of workers this submission has started."""
    workers: int = 0
    """Of the attempt under way."""
    started: float
    updated: float
    metrics: dict[str, float] = {}
    """Of the evaluation of what was, or would have been, published."""
    version: str | None = None
    """``model@version`` that came out of it."""


class RunDirectory:
    """Paths of one run, and its state."""

    def __init__(self, storage: str, job: str, run_id: str) -> None:
        """PlanError when ``storage`` is not a directory that could be reached by path."""
        if not storage.startswith("/"):
            raise PlanError(
                f"storage: {storage} is not a directory, and checkpoints are written as files; mount it on every "
                "node, and write its path"
            )
        self.path = Path(storage) / "runs" / job / run_id
        self._job = job
        self._run_id = run_id

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def stacks(self) -> Path:
        """Where stacks of stuck workers lie."""
        return self.path / "stacks"

    def newest_step(self) -> int:
        """Steps that the newest committed checkpoint holds; 0 when there is none."""
        steps = committed.committed_steps(self.checkpoints)
        return steps[-1] if steps else 0

    def prepare(self, spec: Any) -> None:
        """Make the directory and write ``spec.json``."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_durably(self.path / "spec.json", msgspec.json.format(msgspec.json.encode(spec), indent=2) + b"\n")

    def read_state(self) -> RunState | None:
        """The last state written, None before the first."""
        try:
            return msgspec.json.decode((self.path / "state.json").read_bytes(), type=RunState)
        except FileNotFoundError:
            return None

    def write_state(self, state: RunState) -> None:
        """Replace the state in one step."""
        write_durably(self.path / "state.json", msgspec.json.encode(state))

    def first_state(self) -> RunState:
        """Of a submission that begins now; what an earlier one reached is kept."""
        now, before = time.time(), self.read_state()
        step, of = (0, None) if before is None else (before.step, before.of)
        return RunState(
            job=self._job, run_id=self._run_id, phase="waiting", step=step, of=of, started=now, updated=now
        )
