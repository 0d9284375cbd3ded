"""Scenarios that change the config while requests are under way: nobody may notice."""

from cluster.config.models import ModelConfig
from cluster.control.drill.drill import Drill, in_thread, with_replicas
from cluster.control.drill.judge import Promise
from cluster.control.drill.phase import Phase


async def update(drill: Drill, phase: Phase) -> None:
    """Change what replicas are started with, which replaces them all, and change it back."""
    phase.traffic.start_lanes(drill.options.lanes)
    for what, change in (("update", _with_another_queue), ("update back", lambda model: model)):
        before = {replica.id for replica in await in_thread(drill.site.replicas)}
        await drill.change(phase, what, change)
        after = {replica.id for replica in await in_thread(drill.site.replicas)}
        detail = f"before {sorted(before)}, after {sorted(after)}"
        phase.promises.append(Promise(text=f"{what} replaces every replica", kept=not before & after, detail=detail))
    await drill.enough(phase)


def _with_another_queue(model: ModelConfig) -> ModelConfig:
    """One place less or more in the queue of a replica: harmless, but not to be changed in place."""
    max_waiting = model.batching.max_waiting - 1 if model.batching.max_waiting else 1
    return model.model_copy(update={"batching": model.batching.model_copy(update={"max_waiting": max_waiting})})


async def scale_up(drill: Drill, phase: Phase) -> None:
    """From one replica to two."""
    await drill.scale(1)
    phase.traffic.start_lanes(drill.options.lanes)
    await drill.change(phase, "scale to 2", lambda model: with_replicas(model, 2))
    await drill.whole(2, set())
    await drill.enough(phase)


async def scale_down(drill: Drill, phase: Phase) -> None:
    """From two replicas to one: the streams of the one that goes are handed over."""
    await drill.scale(2)
    phase.traffic.start_lanes(drill.options.lanes)
    await drill.change(phase, "scale to 1", lambda model: with_replicas(model, 1))
    await drill.enough(phase)
