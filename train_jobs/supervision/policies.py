"""Ray Train's questions, answered: how many workers when none run, whether to change their number, whether to go on.

Ray's own elastic policy counts what nodes have, not what they have free: beside Serve, or any other actor, it chooses
a size that cannot be placed, again and again, and ends healthy groups to do so. Ray 2.60's interfaces of policies are
internal ones; they are used in this file and in ``trainer.py``.
"""

import logging
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import MantaError
from train_jobs.run_spec import RunSpec, allowed_sizes
from train_jobs.supervision.cluster_view import view_cluster
from train_jobs.supervision.messages import Look
from train_jobs.supervision.resizing import Resizing
from train_jobs.supervision.restarts import Restarts
from train_jobs.supervision.room import count_places, describe_shortage, free_again, largest
from train_jobs.supervision.stacks import dump_and_end
from train_jobs.trainer.committed import newest_step

logger = logging.getLogger(__name__)

_ASK_AGAIN_S = 1.0
_DUMP_TIMEOUT_S = 120.0


class StuckError(Exception):
    """A worker stood still for too long and was ended; its stacks are in the run directory."""


class StopAskedError(Exception):
    """A run was asked to stop when there was nothing to save: ends it."""


class RoomPolicy(ScalingPolicy):  # type: ignore[misc]  # Ray has no types
    """As many workers as there is room for, between the run's minimum and maximum."""

    def __init__(self, scaling_config: ScalingConfig, spec: RunSpec, monitor: Any) -> None:
        """``monitor`` is the handle of the Monitor actor."""
        super().__init__(scaling_config)
        self._spec = spec
        self._monitor = monitor
        self._needs = spec.needs.resources()
        self._sizes = allowed_sizes(spec)
        self._resizing = Resizing(self._sizes, delay_s=spec.resize_delay_s)
        self._unseen = False
        """A group was started, and nothing has been heard of it since."""

    def _get_num_workers_for_resource_request(self) -> int:
        return self._spec.max_workers

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start what fits now, or look again in a moment; raises StopAskedError when the run is to end."""
        self._maybe_send_resource_request()
        look: Look = ray.get(self._monitor.look.remote())
        if look.stopping:
            raise StopAskedError("the run was asked to stop while it had no workers")
        nodes = [place.node_id for place in look.places.values()]
        view = view_cluster()
        free = free_again(view.free, self._needs, nodes, view.leaving)
        size = largest(self._sizes, count_places(self._needs, free))
        if size is None and self._unseen:
            # what failed before its first sign of life still holds its places, and Ray gives them up for the next one
            self._unseen = False
            return self._start(self._sizes[0])
        if size is None:
            ray.get(self._monitor.wait_for.remote(describe_shortage(self._needs, self._sizes[0], free)))
            time.sleep(_ASK_AGAIN_S)
            return NoopDecision()
        self._unseen = True
        return self._start(size)

    def make_decision_for_running_worker_group(
        self,
        worker_group_state: WorkerGroupState,
        worker_group_status: WorkerGroupPollStatus,  # noqa: ARG002 (Ray's signature)
    ) -> ScalingDecision:
        """Look after the workers; raises WorkerGroupError when one is stuck."""
        self._maybe_send_resource_request()
        self._unseen = False
        look: Look = ray.get(self._monitor.look.remote())
        if look.stuck:
            self._end_stuck(look)
        view = view_cluster()
        nodes = [worker.metadata.node_id for worker in worker_group_state.workers]
        places = count_places(self._needs, free_again(view.free, self._needs, nodes, view.leaving))
        if look.all_paused:
            ray.get(self._monitor.end_attempt.remote("resized"))
            return self._start(largest(self._sizes, places) or self._sizes[0])
        leaving = any(node in view.leaving for node in nodes)
        if look.order == "go" and self._resizing.should(
            size=look.size, places=places, on_leaving_nodes=leaving, now=time.monotonic()
        ):
            reason = "a node of its workers drains" if leaving else f"there is room for {places} workers"
            logger.info("%s; saving, to go on with another number than %d", reason, look.size)
            ray.get(self._monitor.pause.remote(reason))
        return NoopDecision()

    def _start(self, size: int) -> ResizeDecision:
        ray.get(self._monitor.begin_attempt.remote(size))
        self._resizing.restarted()
        return ResizeDecision(num_workers=size, resources_per_worker=self._needs)

    def _end_stuck(self, look: Look) -> None:
        """Write what every worker is doing, end all of them, and raise."""
        folder = self._spec.stacks / f"attempt-{look.attempt}-{time.strftime('%Y%m%dT%H%M%S')}"
        by_node: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for rank, place in look.places.items():
            by_node[place.node_id][f"worker-{rank}"] = place.pid
        dumps = [_dump_on(node_id, pids, folder) for node_id, pids in by_node.items()]
        late = ray.wait(dumps, num_returns=len(dumps), timeout=_DUMP_TIMEOUT_S)[1] if dumps else []
        told = "; ".join(map(str, look.stuck))
        missing = f" ({len(late)} nodes did not answer)" if late else ""
        logger.error("%s; stacks are in %s%s", told, folder, missing)
        ray.get(self._monitor.end_attempt.remote("failed", f"{told}; stacks are in {folder}{missing}"))
        failures: dict[int, Exception] = {one.rank: StuckError(str(one)) for one in look.stuck}
        raise WorkerGroupError(told, failures)


def _dump_on(node_id: str, pids: dict[str, int], folder: Path) -> Any:
    task = ray.remote(dump_and_end).options(
        num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False), max_retries=0
    )
    return task.remote(pids, folder)


class RestartPolicy(FailurePolicy):  # type: ignore[misc]  # Ray has no types
    """Lost workers are replaced until that no longer helps; what is wrong with the job itself ends it at once."""

    def __init__(self, failure_config: FailureConfig, spec: RunSpec, monitor: Any) -> None:
        """``monitor`` is the handle of the Monitor actor."""
        super().__init__(failure_config)
        self._monitor = monitor
        self._checkpoints = spec.checkpoints
        self._restarts = Restarts(spec.max_failures)

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether to start another group."""
        if isinstance(training_failed_error, ControllerError) and isinstance(
            training_failed_error.controller_failure, WorkerGroupStartupTimeoutError
        ):
            return FailureDecision.RETRY  # the room was taken meanwhile
        if not _is_loss(training_failed_error):
            return FailureDecision.RAISE
        logger.warning("workers failed: %s", training_failed_error)
        ray.get(self._monitor.end_attempt.remote("failed", _first_line(training_failed_error)))
        again = self._restarts.try_again(newest_step(self._checkpoints))
        return FailureDecision.RETRY if again else FailureDecision.RAISE


def _first_line(error: TrainingFailedError) -> str:
    """What happened to the first of the workers that failed, in a line."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    told = [f"worker {rank}: {str(failure).splitlines()[0]}" for rank, failure in failures.items() if str(failure)]
    return told[0] if told else type(error).__name__


def _is_loss(error: TrainingFailedError) -> bool:
    if isinstance(error, ControllerError):
        return isinstance(error.controller_failure, WorkerGroupStartupFailedError)
    return deliberate(error) is None


def deliberate(error: TrainingFailedError) -> MantaError | None:
    """What a worker raised on purpose, if one did."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    return next((failure for failure in failures if isinstance(failure, MantaError)), None)
