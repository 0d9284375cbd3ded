"""Where a replica's stages are placed: one actor per stage, in the bundles of the replica's placement group."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.plan.types import ModelAppArgs
from deployments.stage.actor import StageActor
from deployments.stage.link import StageAddress, StageLink

# ``serve`` occupies one thread of the actor for life.
_CALLS_AT_ONCE = 2


@dataclass(slots=True, kw_only=True)
class StageGroup:
    """The stage actors of one replica, created, wired and serving."""

    args: ModelAppArgs
    actors: list[Any] = field(default_factory=list)
    serving: list[Any] = field(default_factory=list)
    """One pending reference per stage: it resolves when that stage stops, with the error if there was one."""
    addresses: list[StageAddress] = field(default_factory=list)

    @classmethod
    async def create(cls, args: ModelAppArgs, group: PlacementGroup, replica_id: str) -> "StageGroup":
        """Place and load all stages at once, then wire them front to back; raises the first stage's own error."""
        stages = cls(args=args)
        try:
            stages.actors = [_place(args, index, group, replica_id) for index in range(len(args.stages))]
            addresses: list[StageAddress] = await asyncio.gather(*(actor.start.remote() for actor in stages.actors))
            await asyncio.gather(
                *(
                    actor.connect_next.remote(after)
                    for actor, after in zip(stages.actors[:-1], addresses[1:], strict=True)
                )
            )
            stages.serving = [actor.serve.remote() for actor in stages.actors]
            stages.addresses = addresses
        except BaseException:
            stages.kill()
            raise
        return stages

    async def connect(self) -> StageLink:
        """The replica's channels to every stage."""
        return await StageLink.connect(self.addresses, step_timeout_s=self.args.step_timeout_s)

    def kill(self) -> None:
        """End every stage's process; those already dead are fine."""
        for actor in self.actors:
            ray.kill(actor)


def _place(args: ModelAppArgs, index: int, group: PlacementGroup, replica_id: str) -> Any:
    threads = str(args.threads_per_stage)
    stage = args.stages[index]
    return (
        ray.remote(StageActor)
        .options(
            name=f"manta:{args.app}:{replica_id}:stage-{index}",
            num_cpus=args.stage_cpus,
            num_gpus=args.stage_gpus,
            memory=stage.memory_bytes if args.stage_memory else None,
            max_concurrency=_CALLS_AT_ONCE,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        )
        .remote(args, index)
    )
