"""Ray Train's trainer with this package's policies in place of its own."""

import functools
from dataclasses import replace
from typing import Any

from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from train_jobs.run_spec import RunSpec
from train_jobs.supervision.policies import RestartPolicy, RoomPolicy
from train_jobs.supervision.process_group import ProcessGroup
from train_jobs.supervision.worker import run_worker


class SupervisedTrainer(DataParallelTrainer):  # type: ignore[misc]  # Ray has no types
    """Runs ``run_worker`` on as many workers as there is room for."""

    def __init__(self, spec: RunSpec, monitor: Any) -> None:
        """``monitor`` is the handle of the Monitor actor."""
        self._bare = replace(spec, arguments=None)
        self._monitor = monitor
        super().__init__(
            functools.partial(run_worker, spec, monitor),  # sent to workers as it is: the controller imports no task
            backend_config=ProcessGroup(
                has_gpus=spec.needs.gpus > 0,
                timeout_s=int(max(spec.start_timeout_s, spec.step_timeout_s)) + 60,  # the watchdog comes first
            ),
            scaling_config=ScalingConfig(
                num_workers=spec.max_workers, use_gpu=spec.needs.gpus > 0, resources_per_worker=spec.needs.resources()
            ),
            run_config=RunConfig(name=spec.run_id, storage_path=str(spec.run_dir.parent)),
        )

    def _create_default_callbacks(self) -> list[Any]:
        """Those of Ray, without a process for Ray Data in every attempt: workers read their shards by index."""
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> Result:
        """Of Ray: starts the controller with these arguments."""
        policies = {
            "scaling_policy": RoomPolicy(self.scaling_config, self._bare, self._monitor),
            "failure_policy": RestartPolicy(FailureConfig(), self._bare, self._monitor),
        }
        return super()._initialize_and_run_controller(**controller_init_kwargs | policies)
