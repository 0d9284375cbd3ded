"""Where a replica's stages are placed: one actor per stage, in the bundles of the replica's placement group."""

import asyncio
import logging
import time
from collections.abc import Collection
from itertools import count
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.plan.types import ModelAppArgs
from deployments.stage.actor import StageActor
from deployments.stage.link import Repair, StageAddress, StageLink
from deployments.stage.vllm_actor import VllmActor

logger = logging.getLogger(__name__)

_numbers = count(1)

# ``serve`` occupies one thread of the actor for as long as it runs.
_CALLS_AT_ONCE = 2
# A living stage has only to listen again; it may be in the middle of a step.
_ANSWER_TIMEOUT_S = 10.0
_MOVE_TIMEOUT_S = 300.0
# While a replica starts, until Serve hands it its settings.
_FIRST_STEPS_TIMEOUT_S = 300.0


class StageGroup:
    """The stage actors of one replica: placed, loaded, wired front to back, and repaired when some die."""

    def __init__(self, args: ModelAppArgs, group: PlacementGroup, replica_id: str) -> None:
        self._args = args
        self._group = group
        self._replica_id = replica_id
        self._actors: list[Any] = []
        self._addresses: list[StageAddress] = []
        # loaded on other nodes, to take over at the next repair
        self._prepared: dict[int, tuple[Any, StageAddress]] = {}
        self._outside: dict[
            int, frozenset[str]
        ] = {}  # stages that left the placement group, and the nodes they avoid
        self._link: StageLink | None = None
        self._step_timeout_s = _FIRST_STEPS_TIMEOUT_S
        self._serving: list[Any] = []  # one pending result per stage; kept, so that its error is Ray's to log

    async def start(self) -> StageLink:
        """Place and load all stages at once, and connect; raises the first stage's own error, all are ended then."""
        try:
            self._actors = [self._place(index) for index in range(len(self._args.stages))]
            self._addresses = await asyncio.gather(*(actor.start.remote() for actor in self._actors))
            return await self._wire()
        except BaseException:
            self.kill()
            raise

    async def prepare_moves(self, draining: Collection[str]) -> list[int]:
        """Load the stages of nodes that drain on other nodes; returns those that take over at the next repair.

        A bundle of the placement group cannot leave its node, so they are placed outside of it. Nothing is moved when
        the replica's own node drains: Serve starts another replica then. Raises what a new stage raises, and
        TimeoutError when no other node has room.
        """
        own = ray.get_runtime_context().get_node_id()
        leaving = [index for index, address in enumerate(self._addresses) if address.node_id in draining]
        if own in draining:
            return []
        for index in leaving:
            if index not in self._prepared:
                self._outside[index] = frozenset(draining) | self._apart(index)
                logger.info("stage %d leaves node %s", index, self._addresses[index].node_id, extra={"stage": index})
                actor = self._place(index)
                try:
                    async with asyncio.timeout(_MOVE_TIMEOUT_S):
                        address: StageAddress = await actor.start.remote()
                except BaseException:
                    ray.kill(actor)
                    del self._outside[index]
                    raise
                self._prepared[index] = actor, address
        return sorted(self._prepared)

    def _apart(self, index: int) -> frozenset[str]:
        """Nodes of the other stages, where no two may share one."""
        if self._args.placement_strategy != "STRICT_SPREAD":
            return frozenset()
        return frozenset(address.node_id for other, address in enumerate(self._addresses) if other != index)

    async def repair(self, suspects: Collection[int] = ()) -> Repair:
        """Replace dead stages, keep the weights of the living, and connect anew; what was computed is forgotten.

        Stages in ``suspects`` are replaced even if they live. The old link must be closed. Raises what a new stage
        raises.
        """
        before, begin = list(self._actors), time.monotonic()
        stages = range(len(before))
        restarts = (self._restart(index, index in suspects) for index in stages)
        # all of them, also when one fails: nothing may be under way when the caller tries again
        results = await asyncio.gather(*restarts, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        self._addresses = [result for result in results if not isinstance(result, BaseException)]
        placed = time.monotonic()
        link = await self._wire()
        replaced = tuple(index for index in stages if before[index] is not self._actors[index])
        load_s = max((self._addresses[index].load_s for index in replaced), default=0.0)
        return Repair(
            link=link,
            replaced=replaced,
            spawn_s=placed - begin - load_s if replaced else 0.0,
            load_s=load_s,
            connect_s=time.monotonic() - placed,
        )

    async def _restart(self, index: int, is_suspect: bool) -> StageAddress:
        prepared = self._prepared.pop(index, None)
        if prepared is not None:
            self._end(index)
            # known at once: while others are still repaired, this stage is not to be moved a second time
            self._actors[index], self._addresses[index] = prepared
        reason = None if prepared is not None else "it is suspect" if is_suspect else self._why_dead(index)
        if reason is None:
            try:
                async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                    address: StageAddress = await self._actors[index].start.remote()
                    return address
            except (TimeoutError, RayActorError) as error:
                reason = type(error).__name__
        logger.warning("stage %d is replaced: %s", index, reason, extra={"stage": index})
        self._end(index)
        self._actors[index] = self._place(index)
        new_address: StageAddress = await self._actors[index].start.remote()
        return new_address

    def _why_dead(self, index: int) -> str | None:
        """What this node's process table says against a stage; None when nothing, or it runs on another node."""
        if self._addresses[index].node_id != ray.get_runtime_context().get_node_id():
            return None
        process = self._process(index)
        if process is None:
            return "its process is gone"
        try:
            status = process.status()
        except psutil.NoSuchProcess:
            return "its process is gone"
        return f"its process is {status}" if status in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE) else None

    def _process(self, index: int) -> psutil.Process | None:
        address = self._addresses[index]
        try:
            process = psutil.Process(address.pid)
        except psutil.NoSuchProcess:
            return None
        return process if abs(process.create_time() - address.process_started_at) < 1.0 else None

    def _end(self, index: int) -> None:
        """End a stage for sure. Ray needs 5 s for a stopped process; on this node it is ended at once."""
        if self._addresses[index].node_id == ray.get_runtime_context().get_node_id():
            process = self._process(index)
            if process is not None:
                process.kill()
        ray.kill(self._actors[index])

    async def _wire(self) -> StageLink:
        if len(self._addresses) > 1:  # a ring: the last tells the first what it chose
            pairs = zip(self._actors, self._addresses[1:] + self._addresses[:1], strict=True)
            await asyncio.gather(*(actor.connect_next.remote(after) for actor, after in pairs))
        self._serving = [actor.serve.remote() for actor in self._actors]
        self._link = await StageLink.connect(self._addresses, step_timeout_s=self._step_timeout_s)
        return self._link

    def set_step_timeout(self, step_timeout_s: float) -> None:
        """The longest a step may take, of the pipeline there is and of every later one."""
        self._step_timeout_s = step_timeout_s
        if self._link is not None:
            self._link.set_step_timeout(step_timeout_s)

    def kill(self) -> None:
        """End every stage's process; those already dead are fine."""
        for actor in (*self._actors, *(actor for actor, _ in self._prepared.values())):
            ray.kill(actor)

    def _place(self, index: int) -> Any:
        args, stage, threads = self._args, self._args.stages[index], str(self._args.threads_per_stage)
        options = {
            "num_cpus": args.stage_cpus,
            "num_gpus": args.stage_gpus,
            "memory": stage.memory_bytes if args.stage_memory else None,
            "max_concurrency": _CALLS_AT_ONCE,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
            **self._placement(index),
        }
        # The name stays with its first holder until Ray has buried it, so a replacement needs one of its own.
        number = next(_numbers)
        name = f"manta:{args.app}:{self._replica_id}:stage-{index}" + (
            f":{number}" if self._is_replacement(index) else ""
        )
        kind = StageActor if args.vllm is None else VllmActor
        return ray.remote(kind).options(name=name, **options).remote(args, index)

    def _placement(self, index: int) -> dict[str, Any]:
        """In the stage's bundle, or on any node but those that it has to avoid."""
        if index not in self._outside:
            bundle = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            return {"scheduling_strategy": bundle}
        avoided = ",".join(sorted(self._outside[index]))
        return {"scheduling_strategy": "DEFAULT", "label_selector": {"ray.io/node-id": f"!in({avoided})"}}

    def _is_replacement(self, index: int) -> bool:
        return index < len(self._actors)
