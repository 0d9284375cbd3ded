"""The learning rate as a function of the step: a schedule and a step in, a factor out."""

import math

from cluster.errors import PlanError
from train_jobs.trainer.spec import ScheduleSpec


def check_schedule(schedule: ScheduleSpec, num_steps: int) -> None:
    """Raises PlanError when warm-up and decay do not fit into the run."""
    decay = schedule.decay_steps or 0
    if schedule.warmup_steps + decay > num_steps:
        raise PlanError(
            f"schedule: {schedule.warmup_steps} warm-up and {decay} decay steps; limit: {num_steps}, the whole run; "
            "lower warmup_steps or decay_steps, or train longer"
        )
    if schedule.kind == "wsd" and not decay:
        raise PlanError("schedule.decay_steps: wsd needs 1 or more; set it, or choose constant")


def learning_rate_factor(schedule: ScheduleSpec, step: int, num_steps: int) -> float:
    """Of the learning rate, at 0-based ``step`` of ``num_steps``.

    Warm-up rises linearly and reaches 1 with its last step. Linear and cosine then fall to
    ``final_fraction``, which they would reach one step after the last, so that no step is wasted on a rate of 0.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    final = schedule.final_fraction or 0.0
    match schedule.kind:
        case "constant":
            return 1.0
        case "linear":
            return _linear(_done(step, schedule.warmup_steps, num_steps), final)
        case "cosine":
            done = _done(step, schedule.warmup_steps, num_steps)
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))
        case "wsd":
            start = num_steps - (schedule.decay_steps or 0)
            return 1.0 if step < start else _linear(_done(step, start, num_steps), final)


def _done(step: int, start: int, stop: int) -> float:
    return (step - start) / (stop - start)


def _linear(done: float, final: float) -> float:
    return 1.0 - (1.0 - final) * done
