"""Settings of a job by their dotted path (``optimizer.lr``): whether there is one, and the job with another value."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import JsonValue

from cluster.config.base import StrictModel
from cluster.config.findings import dotted
from cluster.config.jobs_train import TrainJob


def path_problem(job: TrainJob, path: str, *, fixed: Collection[str]) -> tuple[str, str, str] | None:
    """Message, limit and remedy when ``path`` is no setting of ``job``, or one of the ``fixed``; else None."""
    section: Any = job
    parts = path.split(".")
    for number, part in enumerate(parts):
        here = dotted(tuple(parts[:number])) if number else "the job"
        if isinstance(section, dict):
            return None
        if not isinstance(section, StrictModel):
            limit, remedy = "a setting that has keys", f"write {here}, or set {here} in the job"
            return f"is no setting: {here} has no keys", limit, remedy
        known = [name for name in type(section).model_fields if number or name not in fixed]
        if part not in known:
            matches = difflib.get_close_matches(part, known, n=1)
            remedy = f"did you mean {'.'.join([*parts[:number], matches[0]])}?" if matches else "choose one of them"
            return f"is no setting that a sweep can vary: {here} has no {part}", ", ".join(known), remedy
        section = getattr(section, part)
    return None


def with_values(job: TrainJob, values: Mapping[str, JsonValue]) -> TrainJob:
    """``job`` with each setting of ``values``, by its path, replaced; ValueError when a value is not allowed."""
    data = job.model_dump(mode="json")
    for path, value in values.items():
        *around, last = path.split(".")
        section = data
        for part in around:
            section = section[part]
        section[last] = value
    return TrainJob.model_validate(data)
