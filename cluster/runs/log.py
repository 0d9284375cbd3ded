"""A run's logs: steps and evaluations as they are reported in, a line for each; the same out."""

from pathlib import Path
from typing import Any

import msgspec

from cluster.errors import DataError


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step over all workers; times are those of the worker that reports."""

    step: int
    """Steps done, this one included."""
    num_steps: int
    loss: float
    """Mean over the targets of the global batch."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    num_targets: int
    num_tokens: int
    """Real tokens, without padding."""
    padding_ratio: float
    """Share of positions that are padding."""
    tokens_per_s: float
    mfu: float
    """Achieved share of the devices' matrix product rate, counting six operations per position and matrix element."""
    step_s: float
    data_wait_s: float
    checkpoint_stall_s: float
    memory_bytes: int
    """Resident memory of that worker, or what its accelerator has allocated."""
    staleness: int = 0
    """Updates since the weights that the gradient was computed on; 0 but with strategy parameter_server."""
    time: float
    """When it was done, in seconds since the epoch."""


class EvaluationReport(msgspec.Struct, frozen=True, kw_only=True):
    """An evaluation along the way, after ``step`` steps."""

    step: int
    evaluation: dict[str, Any]
    """Metrics by name; one that is not a finite number is None."""
    time: float


def encode_line(report: StepReport | EvaluationReport) -> str:
    """The line, with its end."""
    return msgspec.json.encode(report).decode() + "\n"


def decode_evaluation(line: bytes) -> EvaluationReport | None:
    """The evaluation in a line, None in that of a step; msgspec's DecodeError for what is no line."""
    return _decode_evaluation(line) if b'"evaluation"' in line else None


def read_log(path: Path) -> tuple[tuple[StepReport, ...], tuple[EvaluationReport, ...]]:
    """Steps and evaluations in order; a last line that is still being written is left for the next time.

    Of evaluations after the same step the last one counts. DataError names a line that is neither.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return (), ()
    steps: list[StepReport] = []
    evaluations: dict[int, EvaluationReport] = {}
    for number, line in enumerate(lines[:-1], start=1):
        try:
            evaluation = decode_evaluation(line)
            if evaluation is not None:
                evaluations[evaluation.step] = evaluation
            else:
                steps.append(_decode_step(line))
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise DataError(f"{path}:{number} is no line of a training log: {error}") from error
    return tuple(steps), tuple(evaluations[step] for step in sorted(evaluations))


_decode_step = msgspec.json.Decoder(StepReport).decode
_decode_evaluation = msgspec.json.Decoder(EvaluationReport).decode
