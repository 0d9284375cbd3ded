"""Nodes that are about to go come in; stages that live on them are moved while their streams go on elsewhere.

Serve starts another replica when the node of the replica itself drains, and that one hands over. It does not look at
the nodes of the stages.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

logger = logging.getLogger(__name__)

POLL_S = 2.0
_MAX_BACK_OFF_S = 30.0

ListDraining = Callable[[], Awaitable[Collection[str]]]


class Movable(Protocol):
    """Stages that can be loaded elsewhere; see :class:`deployments.stage.group.StageGroup`."""

    async def prepare_moves(self, draining: Collection[str]) -> list[int]:
        """Load the stages of these nodes elsewhere; returns those that take over at the next repair."""


class Interruptible(Protocol):
    """An engine whose stages are repaired after a loss."""

    def report_loss(self, reason: str) -> None:
        """Stop, to go on over repaired stages."""


class DrainWatch:
    """Asks for draining nodes every ``poll_s`` seconds; while the control store is away, none are known."""

    def __init__(
        self, engine: Interruptible, stages: Movable, list_draining: ListDraining, poll_s: float = POLL_S
    ) -> None:
        self._engine = engine
        self._stages = stages
        self._list_draining = list_draining
        self._poll_s = poll_s

    async def run(self) -> None:
        """Until cancelled: a stage is loaded elsewhere first, so that its streams pause for a recomputation only."""
        pause_s = self._poll_s
        while True:
            await asyncio.sleep(pause_s)
            try:
                moved = await self._stages.prepare_moves(await self._list_draining())
                pause_s = self._poll_s
            except Exception as error:
                if pause_s == self._poll_s:
                    logger.warning("draining nodes are not known for now, or cannot be left: %r", error)
                pause_s = min(2 * pause_s, _MAX_BACK_OFF_S)
                continue
            if moved:
                self._engine.report_loss(f"the nodes of stages {moved} drain, and other nodes have taken them over")
