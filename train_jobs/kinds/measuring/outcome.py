"""What lm-eval gives back in, plain metrics by ``task/metric`` and what to know about them out."""

import math
from collections.abc import Mapping
from typing import Any

from train_jobs.kinds.measuring.found import Measured

NUM_DOCUMENTS = "num_documents"
_NOT_METRICS = ("name", "alias", "sample_len", "sample_count")
_NO_FILTER = "none"
_NO_ERROR = "N/A"
"""Instead of a standard error that is not defined, as of one document."""


def read_outcome(results: Mapping[str, Any]) -> Measured:
    """Each task's metrics as ``task/metric`` or, where its answers are filtered, ``task/metric/filter``; standard
    errors as ``task/metric_stderr``; and ``task/num_documents``.
    """
    metrics: dict[str, float] = {}
    notes = [_task_note(task, results) for task in results["versions"] if task in results["n-samples"]]
    for task, entries in results["results"].items():
        for key, value in entries.items():
            if key in _NOT_METRICS or value == _NO_ERROR:
                continue
            name = f"{task}/{_metric_name(key)}"
            if isinstance(value, int | float) and math.isfinite(value):
                metrics[name] = float(value)
            else:
                notes.append(f"{name} is {value}, and is left out.")
        if "sample_len" in entries:
            metrics[f"{task}/{NUM_DOCUMENTS}"] = int(entries["sample_len"])
    return Measured(metrics=metrics, notes=tuple(notes))


def _metric_name(key: str) -> str:
    """``acc,none`` is acc; ``exact_match,strict-match`` is exact_match/strict-match."""
    metric, _, filter_name = key.partition(",")
    return metric if filter_name in ("", _NO_FILTER) else f"{metric}/{filter_name}"


def _task_note(task: str, results: Mapping[str, Any]) -> str:
    counts, num_fewshot = results["n-samples"][task], results["n-shot"].get(task, 0)
    asked = f"{counts['effective']:,} of {counts['original']:,} documents, {num_fewshot} solved examples before each"
    return f"{task}: version {results['versions'][task]}, {asked}."
