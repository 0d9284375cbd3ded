"""How far a run is: ``state.json``, written by whoever runs it and read by everybody else."""

from pathlib import Path
from typing import Literal

import msgspec

from cluster.durable import write_json_durably
from cluster.errors import DataError
from cluster.runs.files import STATE

Status = Literal["running", "finished", "stopped", "failed"]
"""stopped: on request, to be continued by submitting again. failed: ``error`` says why."""


class AttemptState(msgspec.Struct, frozen=True, kw_only=True):
    """One group of workers, from its start until it ended or was lost. Times are seconds since the epoch."""

    began: float
    num_workers: int
    resumed_from: int | None = None
    """Steps that were done when it began; None when it began anew."""
    ended: float | None = None
    end: Literal["finished", "stopped", "resized", "failed"] | None = None
    """None while it runs, and for ever when everything was killed at once."""
    reason: str | None = None
    """In words, when there is more to say than ``end`` does."""


class ScoreState(msgspec.Struct, frozen=True, kw_only=True):
    """An evaluation along the way, in a word: the metric by which the run's checkpoints are compared."""

    step: int
    metric: str
    score: float | None


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """A run of a job, of any kind."""

    format: Literal[1] = 1
    run_id: str
    job: str
    kind: Literal["prepare", "train", "tune", "evaluate"]
    status: Status
    error: str | None = None
    waiting: str | None = None
    """What a run that is not over waits for, such as room in the cluster."""
    step: int = 0
    """Steps done."""
    num_steps: int | None = None
    loss: float | None = None
    """Of the last step."""
    tokens_per_s: float | None = None
    score: ScoreState | None = None
    """Of the last evaluation."""
    remaining_s: float | None = None
    """Until the last step, at the pace of this attempt."""
    began: float
    changed: float
    ended: float | None = None
    attempts: tuple[AttemptState, ...] = ()
    data_directory: str | None = None
    """Prepared data that it reads, relative to the storage."""
    published: str | None = None
    """The registry version that came of it, such as ``newsroom@v3``."""
    notes: tuple[str, ...] = ()
    """What a person should know, one sentence each."""


def read_state(run_dir: Path) -> RunState:
    """The state of a run; DataError when there is none, or not one this program can read."""
    path = run_dir / STATE
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunState)
    except FileNotFoundError as error:
        raise DataError(f"{run_dir} holds no run ({STATE} is missing)") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise DataError(f"{path} is not a state this Manta can read: {error}") from error


def write_state(run_dir: Path, state: RunState) -> None:
    """Replace the state of a run as a whole."""
    write_json_durably(run_dir / STATE, state)
