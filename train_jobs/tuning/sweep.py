"""A whole sweep on Ray Tune: a TuneSpec and how to make a run of values in, the table of all trials out."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from cluster.errors import MantaError
from cluster.runs.sweep import Sweep, write_sweep
from train_jobs.job import TuneSpec
from train_jobs.tuning.points import planned_points
from train_jobs.tuning.tpe import make_searcher
from train_jobs.tuning.trial import OVER, POINT, RUN_ID, STEPS, MakeRun, TrialRun, read_values
from train_jobs.tuning.trials import Table

_WORK = "ray-tune"
_RESOURCES = {"CPU": 0.01}
"""Of the process that looks after a trial; the run's workers ask for theirs. Ray Tune refuses nothing at all."""
_NO_LIMIT = 10**9
"""Steps; the trainer ends its runs itself."""


def run_sweep(spec: TuneSpec, make_run: MakeRun, directory: Path, changed: Callable[[Sweep], None]) -> Table:
    """Run all trials, ``spec.concurrent`` at a time; Ray must be connected. ``tune.json`` follows in ``directory``.

    Runs that are there already are continued, so a sweep that is started again goes on where it was. A trial that
    fails is kept in the table. PlanError for points that cannot be, before any run begins.
    """
    points = planned_points(spec)
    for point in points or ():
        make_run(point)
    directory.mkdir(parents=True, exist_ok=True)

    def tell(sweep: Sweep) -> None:
        write_sweep(directory, sweep)
        changed(sweep)

    sweep = Sweep(job=spec.name, varied=spec.job, search=spec.search, metric=spec.metric, mode=spec.mode)
    table = Table(sweep, tell)
    work = directory / _WORK
    shutil.rmtree(work, ignore_errors=True)
    _tuner(spec, make_run, points, work, _Follow(spec, table)).fit()
    shutil.rmtree(work, ignore_errors=True)
    return table


def _tuner(
    spec: TuneSpec, make_run: MakeRun, points: list[dict[str, Any]] | None, work: Path, follow: "_Follow"
) -> tune.Tuner:
    os.environ.setdefault(
        "RAY_AIR_NEW_OUTPUT", "0"
    )  # Ray's newer output has a banner that ``verbose`` does not silence
    trainable = tune.with_resources(tune.with_parameters(TrialRun, spec=spec, make_run=make_run), _RESOURCES)
    return tune.Tuner(
        trainable,
        param_space={} if points is None else {POINT: tune.grid_search(points)},
        tune_config=tune.TuneConfig(
            metric=None if points is None else spec.metric,  # a searcher of its own has them already
            mode=None if points is None else spec.mode,
            num_samples=spec.trials if points is None else 1,
            search_alg=make_searcher(spec) if points is None else None,
            scheduler=_scheduler(spec),
            max_concurrent_trials=spec.concurrent,
        ),
        run_config=tune.RunConfig(
            name=work.name,
            storage_path=str(work.parent),
            callbacks=[follow],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # runs keep their own
            verbose=0,
        ),
    )


def _scheduler(spec: TuneSpec) -> TrialScheduler:
    """ASHA: Li et al., "A System for Massively Parallel Hyperparameter Tuning" (arXiv 1810.05934), or none."""
    if spec.stop is None:
        return FIFOScheduler()
    told = {"metric": spec.metric, "mode": spec.mode} if spec.search == "tpe" else {}
    return AsyncHyperBandScheduler(
        time_attr=STEPS,
        max_t=_NO_LIMIT,
        grace_period=spec.stop.grace_steps,
        reduction_factor=spec.stop.keep_one_of,
        **told,
    )


class _Follow(tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Keeps the table of trials."""

    def __init__(self, spec: TuneSpec, table: Table) -> None:
        self._spec = spec
        self._table = table

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:  # noqa: ARG002 (Ray's signature)
        """A trial begins."""
        self._table.begin(trial.trial_id, read_values(self._spec, trial.config))

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002 (Ray's signature)
        trials: list[TuneTrial],  # noqa: ARG002
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,  # noqa: ARG002
    ) -> None:
        """A run has been evaluated."""
        self._table.evaluated(
            trial.trial_id, run_id=result[RUN_ID], step=result[STEPS], score=float(result[self._spec.metric])
        )

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:  # noqa: ARG002 (Ray's signature)
        """A trial has ended by itself, or by the scheduler's decision."""
        over = bool(trial.last_result.get(OVER))
        self._table.end(trial.trial_id, "finished" if over else "ended early")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:  # noqa: ARG002 (Ray's signature)
        """A trial has failed."""
        self._table.end(trial.trial_id, "failed", _words(trial))


def _words(trial: TuneTrial) -> str:
    """What a trial says about its failure: its own words where it raised on purpose."""
    path = trial.pickled_error_file  # get_pickled_error looks into the storage, where it is not yet
    if path is None or not Path(path).is_file():
        return "its process was lost; the logs of Ray say more"
    error = ray.cloudpickle.loads(Path(path).read_bytes())
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    if isinstance(cause, MantaError):
        return str(cause)
    last_line = str(cause).strip().rpartition("\n")[2]
    return f"{type(cause).__name__}: {last_line}"
