"""All of a run that a person wants to see: a run directory and the storage in, its log, data and results out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cluster.errors import DataError
from cluster.runs.files import EVALUATION, LOG, SPEC
from cluster.runs.state import RunState, read_state
from cluster.runs.sweep import Sweep, read_sweep

DATA = "data"
MANIFEST = "manifest.json"


class StepLine(msgspec.Struct, frozen=True, kw_only=True):
    """A step, as the trainer logs it."""

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_targets: int
    num_tokens: int
    padding_ratio: float
    tokens_per_s: float
    mfu: float
    step_s: float
    data_wait_s: float
    checkpoint_stall_s: float
    memory_bytes: int
    time: float


class EvaluationLine(msgspec.Struct, frozen=True, kw_only=True):
    """An evaluation along the way, after ``step`` steps."""

    step: int
    evaluation: dict[str, Any]
    time: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The last evaluation, on its own."""

    step: int | None = None
    metrics: dict[str, Any]


class DataSource(msgspec.Struct, frozen=True, kw_only=True):
    """One input of prepared data."""

    source: str
    format: str
    weight: float
    num_files: int
    num_bytes: int
    num_rows: int


class DataSplit(msgspec.Struct, frozen=True, kw_only=True):
    """What one split of prepared data holds."""

    num_documents: int
    num_sequences: int
    num_tokens: int
    num_targets: int
    num_text_bytes: int
    num_truncated: int
    fill_ratio: float
    label_counts: dict[str, int] = {}


class BadRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row that could not be used."""

    place: str
    reason: str


class DataSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What the manifest of prepared data says that a person wants to know."""

    name: str
    task: str
    digest: str
    sequence_tokens: int
    labels: tuple[str, ...] | None = None
    num_rows: int
    num_bad_rows: int
    num_duplicates: int
    num_too_short: int
    num_without_targets: int
    bad_rows_sample: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()
    splits: dict[str, DataSplit]
    sources: tuple[DataSource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run as it stands: it may be running, and then has no result yet."""

    directory: Path
    state: RunState
    steps: tuple[StepLine, ...]
    evaluations: tuple[EvaluationLine, ...]
    evaluation: Evaluation | None
    settings: Mapping[str, Any]
    """What was asked for, by dotted path."""
    data: DataSummary | None
    sweep: Sweep | None
    """The trials of a tune job."""


def read_run(directory: Path, storage: Path) -> RunRecord:
    """The run in ``directory``; DataError when it has no state, or a file of it cannot be read."""
    state = read_state(directory)
    steps, evaluations = _read_log(directory / LOG)
    written = _read_json(directory / EVALUATION, Evaluation)
    last = None if not evaluations else Evaluation(step=evaluations[-1].step, metrics=evaluations[-1].evaluation)
    data = None
    if state.data_directory is not None:
        data = _read_json(storage / DATA / state.data_directory / MANIFEST, DataSummary)
    return RunRecord(
        directory=directory,
        state=state,
        steps=steps,
        evaluations=evaluations,
        evaluation=written or last,
        settings=flatten(_read_json(directory / SPEC, dict[str, Any]) or {}),
        data=data,
        sweep=read_sweep(directory),
    )


def _read_json(path: Path, kind: Any) -> Any:
    """The file as ``kind``; None when there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise DataError(f"{path} is not what this Manta writes: {error}") from error


def _read_log(path: Path) -> tuple[tuple[StepLine, ...], tuple[EvaluationLine, ...]]:
    """Steps and evaluations in order; a last line that is still being written is left for the next time."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return (), ()
    steps: list[StepLine] = []
    evaluations: list[EvaluationLine] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            if b'"evaluation"' in line:
                evaluations.append(decode_evaluation(line))
            else:
                steps.append(_decode_step(line))
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise DataError(f"{path}:{number} is no line of a training log: {error}") from error
    return tuple(steps), tuple(evaluations)


_decode_step = msgspec.json.Decoder(StepLine).decode
decode_evaluation = msgspec.json.Decoder(EvaluationLine).decode


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted path; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    return found
