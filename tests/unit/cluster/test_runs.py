"""Runs of jobs on disk: states that survive being read, the newest run, directories that are none."""

import os
from pathlib import Path

import msgspec
import pytest

from cluster.errors import DataError, UsageError
from cluster.runs.files import newest_run, run_directories
from cluster.runs.state import AttemptState, RunState, read_state, write_state

STATE = RunState(run_id="newsroom-1a2b", job="newsroom", kind="train", status="running", began=1.0, changed=2.0)


def add_run(storage: Path, run_id: str, changed: float) -> Path:
    directory = storage / "runs" / "newsroom" / run_id
    directory.mkdir(parents=True)
    write_state(directory, msgspec.structs.replace(STATE, run_id=run_id))
    os.utime(directory / "state.json", (changed, changed))
    return directory


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    attempt = AttemptState(began=1.0, num_workers=2, resumed_from=50, ended=3.0, end="failed", reason="killed")
    state = msgspec.structs.replace(STATE, attempts=(attempt,), published="newsroom@v2")
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state


def test_the_newest_run_is_the_one_that_was_changed_last(tmp_path: Path) -> None:
    old, new = add_run(tmp_path, "b", 100.0), add_run(tmp_path, "a", 200.0)
    (tmp_path / "runs" / "newsroom" / "being-made").mkdir()
    assert run_directories(tmp_path, "newsroom") == [new, old]
    assert newest_run(tmp_path, "newsroom") == new
    with pytest.raises(
        UsageError, match=r"job speeches has no run in .*; start one with `manta train CONFIG speeches`"
    ):
        newest_run(tmp_path, "speeches")


def test_states_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no run \(state.json is missing\)"):
        read_state(tmp_path)
    (tmp_path / "state.json").write_text('{"run_id": 3}')
    with pytest.raises(DataError, match="is not a state this Manta can read"):
        read_state(tmp_path)
