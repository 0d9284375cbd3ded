"""What Ray Train runs on every worker: a RunSpec in, the trainer's result out."""

import os
import time
from typing import Any

import ray
from ray import train
from ray.train.torch import get_device

from cluster.control.code import check_code_digest
from train_jobs.run_spec import RunSpec
from train_jobs.supervision.measuring import set_up_process
from train_jobs.supervision.messages import Place
from train_jobs.supervision.pulse import BEAT_S, Pulse
from train_jobs.trainer.hooks import Hooks, TrainResult
from train_jobs.trainer.loop import Trainer
from train_jobs.trainer.materials import gather
from train_jobs.trainer.world import World


def run_worker(spec: RunSpec, monitor: Any) -> TrainResult:
    """One worker's attempt: from wherever the run directory stands to the end, a stop, or a pause that never ends."""
    check_code_digest(spec.code_digest)
    rank = train.get_context().get_world_rank()
    place = Place(node_id=ray.get_runtime_context().get_node_id(), pid=os.getpid())
    attempt = ray.get(monitor.join.remote(rank, place))
    pulse = Pulse(monitor, job=spec.job, attempt=attempt, rank=rank)
    try:
        result = train_here(spec, World.current(get_device()), pulse, evaluates=not spec.evaluates_beside)
        while result.outcome == "stopped" and pulse.say("paused") == "pause":
            time.sleep(BEAT_S)  # the controller ends this process once it has seen that every worker has saved
        pulse.say("ended")
    finally:
        pulse.close()
    return result


def train_here(spec: RunSpec, world: World, hooks: Hooks, *, evaluates: bool = True) -> TrainResult:
    """Do one worker's attempt in this process, without Ray; errors are those of :meth:`Trainer.run`."""
    set_up_process(spec)
    materials = gather(spec.materials, spec.arguments)
    return Trainer(
        spec=spec.train,
        task=materials.task,
        shards=materials.shards,
        evaluation_data=materials.evaluation_data,
        run_dir=spec.run_dir,
        world=world,
        hooks=hooks,
        evaluates=evaluates,
    ).run()
