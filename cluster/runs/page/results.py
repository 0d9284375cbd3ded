"""What stands on the page besides charts: a record in, tiles and the rows of its tables out."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.runs.page.curves import duration, percent, short
from cluster.runs.page.panels import throughput
from cluster.runs.prepared import Manifest
from cluster.runs.record import RunRecord
from cluster.runs.state import AttemptState
from cluster.units import format_bytes

_RATIOS = ("accuracy", "macro_f1", "token_accuracy", "calibration_error")
_HEADLINES = ("macro_f1", "accuracy", "bits_per_byte", "perplexity", "loss")
_WORDS = {
    "loss": "loss (nats per target)",
    "macro_f1": "macro-F1",
    "bits_per_byte": "bits per byte",
    "token_accuracy": "token accuracy",
    "calibration_error": "calibration error",
    "margin": "reward margin",
    "num_items": "items",
    "num_targets": "targets",
    "num_pairs": "pairs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One number at the top."""

    name: str
    value: str
    note: str = ""


def tiles(record: RunRecord, now: float) -> list[Tile]:
    """The numbers that one wants to see first, those that the run has."""
    found = list(_result_tiles(record))
    state = record.state
    lasted = (state.ended or max(state.changed, now if state.status == "running" else 0.0)) - state.began
    attempts = len(state.attempts)
    note = f"{attempts} attempts" if attempts > 1 else ""
    found.append(Tile(name="time", value=duration(max(0.0, lasted)), note=note))
    if record.steps:
        last = record.steps[-1]
        stall_s = sum(line.checkpoint_stall_s for line in record.steps)
        found += [
            Tile(name="tokens/s", value=short(throughput(record.steps)), note="median step"),
            Tile(name="MFU", value=percent(last.mfu), note="of peak, last step"),
            Tile(name="checkpoint stall", value=percent(stall_s / _step_time(record)), note=duration(stall_s)),
            Tile(name="memory", value=format_bytes(max(line.memory_bytes for line in record.steps)), note="peak"),
        ]
    return found


def _result_tiles(record: RunRecord) -> Iterable[Tile]:
    metrics = record.evaluation.metrics if record.evaluation is not None else {}
    for name in _HEADLINES:
        if name in metrics and name != "loss":
            yield Tile(name=_WORDS.get(name, name), value=metric_text(name, metrics[name]), note="evaluation")
    if record.steps:
        losses = [line.loss for line in record.steps]
        yield Tile(name="loss", value=short(losses[-1]), note=f"from {short(losses[0])}")


def _step_time(record: RunRecord) -> float:
    return sum(line.step_s for line in record.steps) or 1.0


def metric_text(name: str, value: Any) -> str:
    """A metric as a person writes it."""
    if name in _RATIOS:
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Plain metrics with their values; tables among them are left to :func:`class_rows` and the template."""
    plain = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return [(_WORDS.get(name, _words(name)), metric_text(name, value)) for name, value in plain.items()]


def _words(name: str) -> str:
    """A metric's name in words; those of lm-eval, ``task/metric``, as they are."""
    return name if "/" in name else name.replace("_", " ")


def confusion_rows(metrics: Mapping[str, Any]) -> list[tuple[str, list[tuple[int, float]]]]:
    """Per true class: its label, and per predicted class how many items and their share of the row."""
    labels = [row["label"] for row in metrics.get("classes", ())]
    rows = []
    for label, counts in zip(labels, metrics.get("confusion", ()), strict=False):
        total = sum(counts) or 1
        rows.append((label, [(count, count / total) for count in counts]))
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    """One line of the table of attempts."""

    number: int
    began: str
    lasted: str
    num_workers: int
    resumed: str
    end: str
    bad: bool


def attempt_rows(attempts: Sequence[AttemptState], running: bool) -> list[AttemptRow]:
    """Every attempt, in order; one without an end that is not the last one, or not running, was lost."""
    rows = []
    for number, attempt in enumerate(attempts, start=1):
        alive = attempt.end is None and running and number == len(attempts)
        end = "running" if alive else attempt.end or "lost with the job"
        rows.append(
            AttemptRow(
                number=number,
                began=moment(attempt.began),
                lasted="" if attempt.ended is None else duration(attempt.ended - attempt.began),
                num_workers=attempt.num_workers,
                resumed="from the start" if attempt.resumed_from is None else f"after step {attempt.resumed_from}",
                end=f"{end}: {attempt.reason}" if attempt.reason else end,
                bad=end in ("failed", "lost with the job"),
            )
        )
    return rows


def label_rows(data: Manifest) -> list[tuple[str, list[tuple[int, float]]]]:
    """Per label: its name, and per split how many documents and their share of the largest such count."""
    splits = [split.label_counts for split in data.splits.values()]
    largest = max((count for counts in splits for count in counts.values()), default=0)
    labels = data.labels or ()
    if not largest:
        return []
    return [
        (label, [(counts.get(label, 0), counts.get(label, 0) / largest) for counts in splits]) for label in labels
    ]


def left_out(data: Manifest) -> list[tuple[str, int]]:
    """Rows that are not in the data, by the reason."""
    counts = [
        ("malformed", data.num_bad_rows),
        ("duplicates", data.num_duplicates),
        ("too short", data.num_too_short),
        ("nothing to learn", data.num_without_targets),
    ]
    return [(name, count) for name, count in counts if count]


def setting_rows(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was asked for, as text."""
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in settings.items()
    ]


def moment(seconds: float) -> str:
    """A time of day, on this machine's clock."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
