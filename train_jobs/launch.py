"""A run from start to end: a RunSpec in; workers on Ray, a run directory and an outcome out. Runs in the driver."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, NoReturn

import ray
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config.nodes import TRAIN_SLOT
from cluster.durable import write_json_durably
from cluster.errors import PlanError
from cluster.runs.files import SPEC, STATE
from cluster.runs.state import RunState, read_state
from train_jobs.run_spec import RunSpec, allowed_sizes
from train_jobs.supervision.evaluations import Evaluations
from train_jobs.supervision.monitor import Monitor
from train_jobs.supervision.policies import StopAskedError, deliberate
from train_jobs.supervision.trainer import SupervisedTrainer
from train_jobs.trainer.committed import retain
from train_jobs.trainer.errors import TrainingError
from train_jobs.trainer.hooks import TrainResult, as_evaluated

Watcher = Callable[[RunState], None]
"""Told of the run's state about once a second."""

NAMESPACE = "manta-train"
_SETTINGS = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's /api/train/v2/runs/v1
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # RoomPolicy looks at draining nodes itself, and saves first
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # groups are started when they fit
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
_TELL_EVERY_S = 1.0
_ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a launch ended, and the state it left in the run directory."""

    result: TrainResult
    state: RunState


def launch(spec: RunSpec, watcher: Watcher) -> Outcome:
    """Train to the end, from wherever the run stands; Ray must be connected.

    SIGTERM and Ctrl-C save and stop the run. Raises PlanError for what cannot be, whatever workers raise on purpose,
    and TrainingError when workers are lost again and again.
    """
    allowed_sizes(spec)
    _check_slots()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    spec.run_dir.mkdir(parents=True, exist_ok=True)
    write_json_durably(spec.run_dir / SPEC, spec.settings)
    monitor = _start_monitor(spec)
    try:
        return _follow(spec, monitor, watcher)
    finally:
        ray.kill(monitor)


def request_stop(spec: RunSpec) -> None:
    """Have a run that is under way anywhere in the cluster save and end; nothing happens where it is not."""
    try:
        monitor = ray.get_actor(_name(spec), namespace=NAMESPACE)
    except ValueError:
        return
    monitor.stop.remote()


def _name(spec: RunSpec) -> str:
    """Of the run's monitor."""
    return f"{spec.job}/{spec.run_id}"


def _check_slots() -> None:
    if not any(node["Resources"].get(TRAIN_SLOT) for node in ray.nodes() if node["Alive"]):
        raise PlanError(
            f"no node of the cluster has the resource {TRAIN_SLOT}, which says how many training workers it takes; "
            f"write `{TRAIN_SLOT}: 2` under resources of a node (local), or start nodes with "
            f"`ray start --resources '{{\"{TRAIN_SLOT}\": 2}}'`"
        )


def _start_monitor(spec: RunSpec) -> Any:
    """The run's monitor, beside the driver and gone with it; its name keeps a second driver out."""
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    name = _name(spec)
    actor = ray.remote(Monitor).options(name=name, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here)
    try:
        bare = replace(spec, arguments=None)  # spares it the imports of a task
        return actor.remote(bare, read_state(spec.run_dir) if (spec.run_dir / STATE).is_file() else None)
    except ValueError as error:  # Ray's word for a name that is taken
        raise TrainingError(
            f"run {name} is under way already; follow it in {spec.run_dir}, or stop it before submitting it again"
        ) from error


def _follow(spec: RunSpec, monitor: Any, watcher: Watcher) -> Outcome:
    fit = _Fit(spec, monitor)
    with closing(Evaluations(spec, monitor)) as evaluations, _stop_signals() as asked_to_stop:
        follow = _Follow(monitor, evaluations, watcher, asked_to_stop)
        fit.start()
        while fit.is_alive():
            fit.join(_TELL_EVERY_S)
            follow.look()
        trained = fit.result is not None and fit.result.outcome == "finished"
        while trained and follow.await_evaluations():
            time.sleep(_TELL_EVERY_S / 2)
    error = evaluations.error or fit.error
    if error is not None:
        _conclude_failed(spec, monitor, watcher, fit, error)
    assert fit.result is not None, "Ray Train ended without a result and without an error"
    result = replace(fit.result, outcome="stopped") if trained and follow.stopping else fit.result
    return _conclude(spec, monitor, watcher, result)


class _Follow:
    """What the driver does about once a second: pass on what is asked of the run, and what is to be told of it."""

    def __init__(
        self, monitor: Any, evaluations: Evaluations, watcher: Watcher, asked_to_stop: threading.Event
    ) -> None:
        self._monitor = monitor
        self._evaluations = evaluations
        self._watcher = watcher
        self._asked_to_stop = asked_to_stop
        self.stopping = False

    def look(self) -> None:
        """While there are workers, or there may be."""
        if self._asked_to_stop.is_set() or (self._evaluations.error is not None and not self.stopping):
            self._asked_to_stop.clear()
            self._monitor.stop.remote()
        with suppress(ray.exceptions.GetTimeoutError):
            look = ray.get(self._monitor.look.remote(), timeout=_ANSWER_TIMEOUT_S)
            self.stopping = look.stopping
            if look.begun:
                self._evaluations.advance()
            self._watcher(ray.get(self._monitor.state.remote(), timeout=_ANSWER_TIMEOUT_S))

    def await_evaluations(self) -> bool:
        """When the workers are done: whether there is still something to wait for."""
        step = self._evaluations.advance()
        if step is not None:
            self._monitor.wait_for.remote(f"its training is done; it is being evaluated as it was after step {step}")
        self.look()
        return step is not None and not self.stopping


def _conclude_failed(spec: RunSpec, monitor: Any, watcher: Watcher, fit: "_Fit", error: Exception) -> NoReturn:
    ours = _as_ours(spec, error)
    attempt = ("failed", str(ours)) if fit.result is None else (fit.result.outcome, None)
    ray.get(monitor.end_attempt.remote(*attempt))
    done = {} if fit.result is None else {"step": fit.result.step, "num_steps": fit.result.num_steps}
    status = "stopped" if _stopped(error) else "failed"
    watcher(ray.get(monitor.conclude.remote(status=status, error=str(ours), **done)))
    raise ours from (None if ours is error else error)


def _conclude(spec: RunSpec, monitor: Any, watcher: Watcher, result: TrainResult) -> Outcome:
    kept, evaluation = spec.train.checkpoint, spec.train.evaluation
    mode = "min" if evaluation is None else evaluation.mode
    retain(spec.checkpoints, keep_last=kept.keep_last, keep_best=kept.keep_best, mode=mode)
    ray.get(monitor.end_attempt.remote(result.outcome))
    done = {"status": result.outcome, "step": result.step, "num_steps": result.num_steps}
    state: RunState = ray.get(monitor.conclude.remote(**done))
    watcher(state)
    return Outcome(result=as_evaluated(result, spec.train), state=state)


class _Fit(threading.Thread):
    """Ray Train's blocking call; signals stay with the main thread."""

    def __init__(self, spec: RunSpec, monitor: Any) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = SupervisedTrainer(spec, monitor)
        self.result: TrainResult | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Until the run has ended."""
        try:
            self.result = self._trainer.fit().return_value
        except Exception as error:  # handed to the main thread
            self.error = error


def _stopped(error: Exception) -> bool:
    """Whether a run without workers, which could save nothing, was asked to stop."""
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, StopAskedError)


def _as_ours(spec: RunSpec, error: Exception) -> Exception:
    if not isinstance(error, TrainingFailedError):
        return error
    if _stopped(error):
        return TrainingError(f"job {spec.job}: stopped while it had no workers; submit it again to go on")
    own = deliberate(error)
    if own is not None:
        return own
    return TrainingError(
        f"job {spec.job}: its workers failed more than {spec.max_failures} times in a row without a new checkpoint; "
        f"the last time: {error}"
    )


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set, inside the block; only the main thread can be told."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the signature of a handler)
        asked.set()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
