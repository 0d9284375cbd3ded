"""A sweep on disk: ``tune.json``, written by the tune job while its trials run, and read by everybody else."""

from pathlib import Path
from typing import Any, Literal

import msgspec

from cluster.durable import write_json_durably
from cluster.errors import DataError

TUNE = "tune.json"
TrialStatus = Literal["running", "finished", "ended early", "failed"]


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the job with values of its own."""

    number: int
    """From 1, in the order in which they began."""
    values: dict[str, Any]
    run_id: str | None = None
    """Name of its run directory; None before it has been evaluated."""
    status: TrialStatus
    step: int = 0
    """After which it was evaluated last."""
    score: float | None = None
    """Its metric then; None before the first evaluation."""
    error: str | None = None
    seconds: float = 0.0


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """All trials of a tune job."""

    format: Literal[1] = 1
    job: str
    varied: str
    """The train job."""
    search: str
    metric: str
    mode: Literal["min", "max"]
    best: int | None = None
    """Number of the best finished trial."""
    published: str | None = None
    """The registry version that came of it."""
    trials: tuple[Trial, ...] = ()


def ranked(sweep: Sweep) -> list[Trial]:
    """Finished trials from the best to the worst, then the others by how far they came."""
    sign = -1 if sweep.mode == "max" else 1
    order = {"finished": 0, "running": 1, "ended early": 2, "failed": 3}

    def place(trial: Trial) -> tuple[float, ...]:
        score = sign * trial.score if trial.score is not None else float("inf")
        return (order[trial.status], 0 if trial.status == "finished" else -trial.step, score, trial.number)

    return sorted(sweep.trials, key=place)


def write_sweep(directory: Path, sweep: Sweep) -> None:
    """Replace ``tune.json`` as a whole."""
    write_json_durably(directory / TUNE, sweep)


def read_sweep(directory: Path) -> Sweep | None:
    """What ``tune.json`` says, None when there is none; DataError when it is not one this program can read."""
    path = directory / TUNE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Sweep)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise DataError(f"{path} is not a sweep this Manta can read: {error}") from error
