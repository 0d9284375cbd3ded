"""Scenarios that change the config while requests are under way: nobody may notice."""

from cluster.config.models import ModelConfig
from cluster.control.drill.drill import Drill, with_replicas
from cluster.control.drill.phase import Phase

_LONGER_DRAIN_S = 1.0


async def update(drill: Drill, phase: Phase) -> None:
    """Change a timeout, which replaces every replica, and change it back."""
    phase.traffic.start_lanes(drill.options.lanes)
    await drill.change(phase, "update", _with_longer_drain)
    await drill.change(phase, "update back", lambda model: model)
    await drill.enough(phase)


def _with_longer_drain(model: ModelConfig) -> ModelConfig:
    drain_s = (model.timeouts.drain or model.timeouts.request) + _LONGER_DRAIN_S
    return model.model_copy(update={"timeouts": model.timeouts.model_copy(update={"drain": drain_s})})


async def scale_up(drill: Drill, phase: Phase) -> None:
    """From one replica to two."""
    await drill.scale(1)
    phase.traffic.start_lanes(drill.options.lanes)
    await drill.change(phase, "scale to 2", lambda model: with_replicas(model, 2))
    await drill.enough(phase)


async def scale_down(drill: Drill, phase: Phase) -> None:
    """From two replicas to one: the streams of the one that goes are handed over."""
    await drill.scale(2)
    phase.traffic.start_lanes(drill.options.lanes)
    await drill.change(phase, "scale to 1", lambda model: with_replicas(model, 1))
    await drill.enough(phase)
