"""The monitor of a run: beats of its workers in, orders and ``state.json`` out. One actor, beside the driver."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from cluster.runs.log import StepReport
from cluster.runs.state import AttemptState, RunState, ScoreState, write_state
from train_jobs.run_spec import RunSpec
from train_jobs.supervision.messages import Beat, Look, Order, Place
from train_jobs.supervision.watchdog import Watch
from train_jobs.trainer import committed

_WRITE_EVERY_S = 1.0
End = Literal["finished", "stopped", "resized", "failed"]


@dataclass
class _Attempt:
    """One group of workers."""

    number: int
    size: int
    watch: Watch
    order: Order = "go"
    places: dict[int, Place] = field(default_factory=dict)
    first: tuple[int, float] | None = None
    """Steps done at the first report, and when."""


class Monitor:
    """Knows where every worker is; the only one that writes the run's state."""

    def __init__(self, spec: RunSpec, before: RunState | None, clock: Callable[[], float] = time.monotonic) -> None:
        """``before`` is what an earlier launch left; ``clock`` is a steady one, seconds."""
        self._spec = spec
        self._clock = clock
        self._stopping = False
        self._written = clock()
        self._attempt = self._new_attempt(0, 0)
        self._state = _begun(spec, before)
        write_state(spec.run_dir, self._state)

    def begin_attempt(self, size: int) -> None:
        """A group of ``size`` workers is about to be started; whatever was before it has ended."""
        self._attempt = self._new_attempt(self._attempt.number + 1, size)
        step = committed.newest_step(self._spec.checkpoints)
        began = AttemptState(began=time.time(), num_workers=size, resumed_from=step)
        self._change(waiting=None, attempts=(*_given_up(self._state.attempts), began))

    def join(self, rank: int, place: Place) -> int:
        """Worker ``rank`` begins; returns the number of its attempt."""
        self._attempt.places[rank] = place
        return self._attempt.number

    def beat(self, beat: Beat) -> Order:
        """A worker says where it is, and is told what to do."""
        attempt = self._attempt
        if beat.attempt != attempt.number:
            return "stop"  # of a group that has been given up
        now = self._clock()
        attempt.watch.heard(beat.rank, beat.stage, beat.step, now)
        if beat.report is not None:
            attempt.first = attempt.first or (beat.report.step, now)
            if now - self._written >= _WRITE_EVERY_S:
                self._tell(beat.report, attempt.first)
        return "stop" if self._stopping else attempt.order

    def look(self) -> Look:
        """The attempt under way."""
        attempt = self._attempt
        return Look(
            attempt=attempt.number,
            size=attempt.size,
            places=dict(attempt.places),
            begun=attempt.watch.begun,
            stuck=attempt.watch.stuck(self._clock()),
            all_paused=attempt.size > 0 and attempt.watch.all_in("paused"),
            order=attempt.order,
            stopping=self._stopping,
        )

    def pause(self, reason: str) -> None:
        """Have the attempt's workers save and wait."""
        self._attempt.order = "pause"
        self._change(waiting=f"{reason}: saving, to go on with another number of workers")

    def stop(self) -> None:
        """Have the run save and end."""
        self._stopping = True
        self._change(waiting="the run was asked to stop: saving")

    def wait_for(self, what: str) -> None:
        """No group can be started now."""
        if self._state.waiting != what:
            self._change(waiting=what)

    def evaluated(self, step: int, score: float | None) -> None:
        """The model has been measured as it was after ``step`` steps."""
        assert self._spec.train.evaluation is not None
        self._change(score=ScoreState(step=step, metric=self._spec.train.evaluation.metric, score=score))

    def end_attempt(self, end: End, reason: str | None = None) -> None:
        """The group of workers is gone, or will be."""
        attempts = self._state.attempts
        if attempts and attempts[-1].end is None:
            last = msgspec.structs.replace(attempts[-1], ended=time.time(), end=end, reason=reason)
            self._change(attempts=(*attempts[:-1], last))

    def conclude(self, **values: Any) -> RunState:
        """The last word about this launch: fields of the state."""
        self._change(**{"ended": time.time(), "waiting": None, "remaining_s": None} | values)
        return self._state

    def state(self) -> RunState:
        """Where the run stands."""
        return self._state

    def _new_attempt(self, number: int, size: int) -> _Attempt:
        watch = Watch(
            size,
            start_timeout_s=self._spec.start_timeout_s,
            step_timeout_s=self._spec.step_timeout_s,
            now=self._clock(),
        )
        return _Attempt(number=number, size=size, watch=watch)

    def _tell(self, report: StepReport, first: tuple[int, float]) -> None:
        num_done, spent_s = report.step - first[0], self._clock() - first[1]
        self._change(
            step=report.step,
            num_steps=report.num_steps,
            loss=report.loss,
            tokens_per_s=report.tokens_per_s,
            remaining_s=(report.num_steps - report.step) * spent_s / num_done if num_done else None,
        )

    def _change(self, **values: Any) -> None:
        self._state = msgspec.structs.replace(self._state, changed=time.time(), **values)
        self._written = self._clock()
        write_state(self._spec.run_dir, self._state)


def _begun(spec: RunSpec, before: RunState | None) -> RunState:
    """The state of a launch that begins now."""
    now = time.time()
    if before is None:
        before = RunState(run_id=spec.run_id, job=spec.job, kind="train", status="running", began=now, changed=now)
    return msgspec.structs.replace(
        before,
        status="running",
        error=None,
        waiting=None,
        ended=None,
        changed=now,
        attempts=_given_up(before.attempts),
        data_directory=spec.data_directory,
    )


def _given_up(attempts: tuple[AttemptState, ...]) -> tuple[AttemptState, ...]:
    """Attempts of which no end was heard have ended all the same."""
    return tuple(
        one if one.end is not None else msgspec.structs.replace(one, end="failed", reason="ended without a word")
        for one in attempts
    )
