"""All of a run that a person wants to see: a run directory and the storage in, its log, data and results out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cluster.errors import DataError
from cluster.runs.files import EVALUATION, EVALUATIONS, LOG, MANIFEST, SPEC
from cluster.runs.log import EvaluationReport, StepReport, read_log
from cluster.runs.prepared import Manifest, read_manifest
from cluster.runs.state import RunState, read_state
from cluster.runs.sweep import Sweep, read_sweep


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The last evaluation, on its own."""

    step: int | None = None
    metrics: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run as it stands: it may be running, and then has no result yet."""

    directory: Path
    state: RunState
    steps: tuple[StepReport, ...]
    evaluations: tuple[EvaluationReport, ...]
    evaluation: Evaluation | None
    settings: Mapping[str, Any]
    """What was asked for, by dotted path."""
    data: Manifest | None
    sweep: Sweep | None
    """The trials of a tune job."""


def read_run(directory: Path, storage: Path) -> RunRecord:
    """The run in ``directory``; DataError when it has no state, or a file of it cannot be read."""
    state = read_state(directory)
    steps, evaluations = read_log(directory / LOG)[0], read_log(directory / EVALUATIONS)[1]
    written = _read_json(directory / EVALUATION, Evaluation)
    last = None if not evaluations else Evaluation(step=evaluations[-1].step, metrics=evaluations[-1].evaluation)
    return RunRecord(
        directory=directory,
        state=state,
        steps=steps,
        evaluations=evaluations,
        evaluation=written or last,
        settings=flatten(_read_json(directory / SPEC, dict[str, Any]) or {}),
        data=None if state.data_directory is None else _read_data(storage / state.data_directory),
        sweep=read_sweep(directory),
    )


def _read_data(directory: Path) -> Manifest | None:
    """What its manifest says; None once the data have been removed."""
    return read_manifest(directory) if (directory / MANIFEST).is_file() else None


def _read_json(path: Path, kind: Any) -> Any:
    """The file as ``kind``; None when there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise DataError(f"{path} is not what this Manta writes: {error}") from error


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted path; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    return found
