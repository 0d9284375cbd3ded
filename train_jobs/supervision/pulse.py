"""A worker's side of the monitor: the trainer's hooks in, beats out, and orders back."""

import logging
import threading
from pathlib import Path
from typing import Any

import ray

from cluster.runs.log import StepReport
from train_jobs.supervision.messages import Beat, Order
from train_jobs.supervision.telemetry import TrainTelemetry
from train_jobs.supervision.watchdog import Stage
from train_jobs.trainer.committed import Evaluation
from train_jobs.trainer.hooks import StopRequest

logger = logging.getLogger(__name__)

BEAT_S = 0.5
_ANSWER_TIMEOUT_S = 30.0


class Pulse:
    """Hooks of one worker of one attempt. Nothing of it waits on the training thread, but :meth:`say`."""

    def __init__(self, monitor: Any, *, job: str, attempt: int, rank: int) -> None:
        """``monitor`` is the handle of the Monitor actor."""
        self._monitor = monitor
        self._attempt = attempt
        self._rank = rank
        self._telemetry = TrainTelemetry(job, rank)
        self._place: tuple[Stage, int] = ("starting", 0)
        self._report: StepReport | None = None
        self._order: Order = "go"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="pulse", daemon=True)
        self._thread.start()

    def on_step(self, report: StepReport) -> None:
        """Keep the numbers for the next beat."""
        self._report = report
        self._telemetry.count(report)

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Tell the first worker's."""
        if self._rank == 0:
            self._telemetry.evaluated(evaluation.metrics)
            self._monitor.evaluated.remote(step, evaluation.score)

    def on_checkpoint(self, path: Path) -> None:
        """Leave a line in the log."""
        if self._rank == 0:
            logger.info("checkpoint %s is committed", path.name)

    def should_stop(self) -> StopRequest:
        """What the last beat was answered."""
        return "no" if self._order == "go" else "checkpoint_and_stop"

    def heartbeat(self, step: int) -> None:
        """A step begins."""
        self._place = ("stepping", step)

    def waiting(self) -> None:
        """Nothing is to do."""
        self._place = ("waiting", self._place[1])

    def say(self, stage: Stage) -> Order:
        """Tell the monitor at once that another stage begins; returns its order."""
        self._place = (stage, self._place[1])
        return self._beat()

    def close(self) -> None:
        """Fall silent."""
        self._closed.set()
        self._thread.join()
        self._telemetry.close()

    def _beat_on(self) -> None:
        while not self._closed.wait(BEAT_S):
            try:
                self._order = self._beat()
            except ray.exceptions.GetTimeoutError:
                logger.warning("the monitor did not answer within %g s", _ANSWER_TIMEOUT_S)

    def _beat(self) -> Order:
        stage, step = self._place
        report = self._report
        if report is not None:
            self._telemetry.tell(report)
        beat = Beat(
            attempt=self._attempt,
            rank=self._rank,
            stage=stage,
            step=step,
            report=None if self._rank else report,
        )
        order: Order = ray.get(self._monitor.beat.remote(beat), timeout=_ANSWER_TIMEOUT_S)
        return order
