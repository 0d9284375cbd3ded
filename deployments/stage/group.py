"""Where a replica's stages are placed: one actor per stage, in the bundles of the replica's placement group."""

import asyncio
import logging
from itertools import count
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.plan.types import ModelAppArgs
from deployments.stage.actor import StageActor
from deployments.stage.link import StageAddress, StageLink

logger = logging.getLogger(__name__)

_numbers = count(1)

# ``serve`` occupies one thread of the actor for as long as it runs.
_CALLS_AT_ONCE = 2
# A living stage has only to listen again; it may be in the middle of a step.
_ANSWER_TIMEOUT_S = 10.0


class StageGroup:
    """The stage actors of one replica: placed, loaded, wired front to back, and repaired when some die."""

    def __init__(self, args: ModelAppArgs, group: PlacementGroup, replica_id: str) -> None:
        self._args = args
        self._group = group
        self._replica_id = replica_id
        self._actors: list[Any] = []
        self._serving: list[Any] = []  # one pending result per stage; kept, so that its error is Ray's to log

    async def start(self) -> StageLink:
        """Place and load all stages at once, and connect; raises the first stage's own error, all are ended then."""
        try:
            self._actors = [self._place(index) for index in range(len(self._args.stages))]
            return await self._wire(await asyncio.gather(*(actor.start.remote() for actor in self._actors)))
        except BaseException:
            self.kill()
            raise

    async def repair(self) -> tuple[StageLink, list[int]]:
        """Replace dead stages, keep the weights of the living, and connect anew; what was computed is forgotten.

        Returns the new link and the indices of the stages that were replaced. The old link must be closed. Raises
        what a new stage raises.
        """
        before = list(self._actors)
        addresses = await asyncio.gather(*(self._restart(index) for index in range(len(before))))
        replaced = [index for index, actor in enumerate(before) if actor is not self._actors[index]]
        return await self._wire(addresses), replaced

    async def _restart(self, index: int) -> StageAddress:
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                address: StageAddress = await self._actors[index].start.remote()
                return address
        except (TimeoutError, RayActorError) as error:
            logger.warning("stage %d is replaced: %s", index, type(error).__name__, extra={"stage": index})
        ray.kill(self._actors[index])
        self._actors[index] = self._place(index)
        new_address: StageAddress = await self._actors[index].start.remote()
        return new_address

    async def _wire(self, addresses: list[StageAddress]) -> StageLink:
        if len(addresses) > 1:  # a ring: the last tells the first what it chose
            pairs = zip(self._actors, addresses[1:] + addresses[:1], strict=True)
            await asyncio.gather(*(actor.connect_next.remote(after) for actor, after in pairs))
        self._serving = [actor.serve.remote() for actor in self._actors]
        return await StageLink.connect(addresses, step_timeout_s=self._args.step_timeout_s)

    def kill(self) -> None:
        """End every stage's process; those already dead are fine."""
        for actor in self._actors:
            ray.kill(actor)

    def _place(self, index: int) -> Any:
        args, stage, threads = self._args, self._args.stages[index], str(self._args.threads_per_stage)
        options = {
            "num_cpus": args.stage_cpus,
            "num_gpus": args.stage_gpus,
            "memory": stage.memory_bytes if args.stage_memory else None,
            "max_concurrency": _CALLS_AT_ONCE,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index),
        }
        # The name stays with its first holder until Ray has buried it, so a replacement needs one of its own.
        number = next(_numbers)
        name = f"manta:{args.app}:{self._replica_id}:stage-{index}" + (
            f":{number}" if self._is_replacement(index) else ""
        )
        return ray.remote(StageActor).options(name=name, **options).remote(args, index)

    def _is_replacement(self, index: int) -> bool:
        return index < len(self._actors)
