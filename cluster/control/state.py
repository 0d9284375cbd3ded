"""What this machine remembers of a cluster it started: ``local.json`` and a lock in ``<storage>/clusters/<name>``.

The file is written before Ray is started (without a pid) and again when its pid is known, so that whatever was
started can be found and ended after an interruption at any point.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.config.schema import ClusterConfig
from cluster.durable import write_durably
from cluster.errors import ControlError

_START_TIME_TOLERANCE_S = 1.0
"""psutil derives start times from the boot clock; two readings of one process differ by less than this."""


class LocalState(BaseModel):
    """The Ray that was started on this machine, and what with; ``pid`` is None while it is being started."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int | None
    started_at: float | None
    """Start time of process ``pid``, Unix seconds: tells it from a later process with the same pid."""
    temp_dir: str
    dashboard_url: str
    settings: dict[str, str | int | float | dict[str, float]]
    """The part of the config that Ray cannot change while it runs."""

    @property
    def alive(self) -> bool:
        """Whether the process that was started still runs (and is not another one with its pid)."""
        if self.pid is None or self.started_at is None:
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started_at) < _START_TIME_TOLERANCE_S
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def state_directory(config: ClusterConfig) -> Path:
    """Where this machine keeps state and logs of the cluster; under ``~/.manta`` when storage is a URI."""
    return clusters_directory(config.storage_root) / config.name


def clusters_directory(storage: str) -> Path:
    """Where this machine keeps a folder for each cluster with that storage, which is a path or a URI."""
    return Path("~/.manta" if "://" in storage else storage).expanduser() / "clusters"


def read_state(directory: Path) -> LocalState | None:
    """The remembered state; None when nothing was started from here, or all of it was stopped."""
    path = directory / "local.json"
    try:
        return LocalState.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ControlError(
            f"{path} is not readable as the state of a local cluster ({error.error_count()} errors); "
            "end the Ray it describes by hand, then delete the file"
        ) from error


def write_state(directory: Path, state: LocalState) -> None:
    """Replace the state file in one step."""
    directory.mkdir(parents=True, exist_ok=True)
    write_durably(directory / "local.json", json.dumps(state.model_dump(mode="json"), indent=1).encode())


def forget_state(directory: Path) -> None:
    """Remove the state file; fine when there is none."""
    (directory / "local.json").unlink(missing_ok=True)


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the cluster's lock; ControlError naming the holder when another ``manta up`` or ``down`` has it."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ControlError(
                f"another manta (pid {holder}) is changing this cluster (lock {directory / 'lock'}); "
                "wait for it, or end it, and try again"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
