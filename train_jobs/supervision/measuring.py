"""A committed checkpoint of a run in, its metrics out; whoever measures, this computes what the workers would.

A publisher does after a run, and a task of Ray's does beside the training, at a lower priority than that.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cluster.control.code import check_code_digest
from train_jobs.run_spec import RunSpec
from train_jobs.trainer.committed import Evaluation, find_damage, rated
from train_jobs.trainer.errors import CheckpointError
from train_jobs.trainer.loop import numerics
from train_jobs.trainer.materials import Materials, gather
from train_jobs.trainer.state import trained_weights
from train_jobs.trainer.strategies.replicated import Replicated
from train_jobs.trainer.strategies.strategy import Forward
from train_jobs.trainer.world import World

NICENESS = 10
"""Added to that of the process: beside threads that train, an evaluation gets about a tenth of a core."""


def measure(spec: RunSpec, materials: Materials, checkpoint: Path) -> dict[str, Any]:
    """Metrics of a checkpoint on the evaluation data, computed by this process alone.

    CheckpointError when the checkpoint is another task's, and whatever the task raises.
    """
    device = torch.device("cuda" if spec.needs.gpus else "cpu")
    model = materials.task.build_model(spec.train)
    weights = trained_weights(checkpoint, averaged=spec.train.ema is not None)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise CheckpointError(
            f"{checkpoint}: the task's model has no {', '.join(unknown[:5])}; it belongs to another"
        )
    forward = Forward(materials.task, seed=spec.train.seed, precision=spec.train.precision, device=device)
    whole = Replicated(model, forward, World(rank=0, size=1, device=device))
    with numerics(device, deterministic=spec.train.deterministic):
        return dict(whole.evaluate(materials.task, materials.evaluation_data))


def set_up_process(spec: RunSpec) -> None:
    """Threads and libraries as the run's computations expect them; before the first of them."""
    torch.set_num_threads(spec.needs.threads)
    if spec.train.deterministic and spec.needs.gpus:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed


def measure_beside(spec: RunSpec, checkpoint: Path) -> Evaluation:
    """What a task of Ray's does: verify the checkpoint, measure it, and rate it.

    Linux knows priorities of threads. One thread with a lower one, and those that it starts, leave the process as it
    was for the next task that Ray gives to it; a process could not raise its own again.
    """
    check_code_digest(spec.code_digest)
    with ThreadPoolExecutor(1, thread_name_prefix="evaluate", initializer=os.nice, initargs=(NICENESS,)) as thread:
        return thread.submit(_measure_and_rate, spec, checkpoint).result()


def _measure_and_rate(spec: RunSpec, checkpoint: Path) -> Evaluation:
    assert spec.train.evaluation is not None
    set_up_process(spec)
    damage = find_damage(checkpoint)
    if damage is not None:
        raise CheckpointError(f"it cannot be evaluated: {damage}; delete {checkpoint}, and submit the job again")
    return rated(measure(spec, gather(spec.materials, spec.arguments), checkpoint), spec.train.evaluation.metric)
