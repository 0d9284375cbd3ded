"""Runs of the tiny task for the trials of a sweep: the values of a trial in, its RunSpec out."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.tiny_run import tiny_run
from tests.support.tiny_task import EVALUATION
from train_jobs.run_spec import RunSpec
from train_jobs.trainer.spec import Sgd

STEPS = 20


def make_run(folder: Path, values: Mapping[str, Any]) -> RunSpec:
    """A run of one worker with ``optimizer.lr`` of the values.

    One whose rate is 0 refuses its third step; a tiny rate makes slow steps, so that there is something to end early.
    """
    rate = values["optimizer.lr"]
    mishaps = {"refuse_at": None if rate else 2, "step_s": 0.2 if 0 < rate < 1e-3 else 0.0}
    spec = tiny_run(folder, f"lr-{rate}", workers=(1, 1), steps=STEPS, **mishaps)
    optimizer = Sgd(lr=rate, weight_decay=0.0, momentum=0.9, nesterov=False)
    return replace(spec, train=replace(spec.train, optimizer=optimizer, evaluation=EVALUATION))
