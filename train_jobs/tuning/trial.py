"""One trial of a sweep, as Ray Tune asks for it: values in, a run with them, and its evaluations one by one, out."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune

from cluster.errors import MantaError
from cluster.runs.files import STATE
from cluster.runs.log import EvaluationReport
from cluster.runs.state import read_state
from train_jobs.job import TuneSpec
from train_jobs.launch import launch, request_stop
from train_jobs.run_spec import RunSpec
from train_jobs.trainer.errors import TrainingError
from train_jobs.tuning.log_tail import LogTail
from train_jobs.tuning.scores import Score
from train_jobs.tuning.tpe import read_point

POINT = "point"
"""Key of a trial's configuration that holds a planned point."""
STEPS, RUN_ID, OVER = "steps", "run_id", "run_is_over"
"""Keys of a trial's results, besides its metric."""

MakeRun = Callable[[Mapping[str, Any]], RunSpec]
"""The run of the job with these values; pickles. PlanError when there can be none."""

_LOOK_EVERY_S = 0.5
_STOP_WITHIN_S = 120.0


class TrialRun(tune.Trainable):  # type: ignore[misc]  # Ray has no types
    """Launches a run and hands on what is logged of it. A run that has been there before is continued."""

    def setup(self, config: dict[str, Any], *, spec: TuneSpec, make_run: MakeRun) -> None:
        """Of Ray Tune: the trial begins."""
        self._metric = spec.metric
        self._last: dict[str, Any] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._launch, name="run", daemon=True)
        self._pending: list[EvaluationReport] = []
        try:
            self._run = make_run(read_values(spec, config))
        except MantaError as error:  # raised here, it would be told as a lost process
            self._error = error
            return
        self._score = Score(spec.metric, self._run.train)
        self._tail = LogTail(self._run.run_dir)
        self._pending = self._tail.new()

    def step(self) -> dict[str, Any]:
        """Of Ray Tune: the next evaluation, or the end of the run."""
        while not self._pending:
            if self._thread.ident is None:
                if self._error is not None or is_finished(self._run):
                    return self._end()
                self._thread.start()
            self._thread.join(_LOOK_EVERY_S)
            over = not self._thread.is_alive()
            self._pending = self._tail.new()
            if over and not self._pending:
                return self._end()
        line = self._pending.pop(0)
        score = self._score.after(line)
        self._last = {self._metric: score, STEPS: line.step, RUN_ID: self._run.run_id, OVER: False}
        return self._last

    def cleanup(self) -> None:
        """Of Ray Tune: the trial is over, or is ended early; then the run saves, and stops."""
        if self._thread.is_alive():
            request_stop(self._run)
            self._thread.join(_STOP_WITHIN_S)

    def _launch(self) -> None:
        try:
            launch(self._run, lambda _: None)
        except Exception as error:  # handed to the thread that Ray Tune calls
            self._error = error

    def _end(self) -> dict[str, Any]:
        if self._error is not None:
            raise self._error
        if not self._last:
            raise TrainingError(f"run {self._run.run_id} has ended without an evaluation")
        return self._last | {OVER: True, "done": True}


def is_finished(run: RunSpec) -> bool:
    """Whether an earlier sweep has done this run to its end."""
    return (run.run_dir / STATE).is_file() and read_state(run.run_dir).status == "finished"


def read_values(spec: TuneSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trial, from the configuration that Ray Tune has of it."""
    return dict(config[POINT]) if POINT in config else read_point(spec, config)
