"""Keeps an engine on living stages: a loss comes in, the stages are repaired, the engine goes on where it was.

The unit of recovery is the sequence: prompt, parameters and emitted tokens. Everything else is recomputed, so a
stream pauses and then continues with the very token that would have come.
"""

import asyncio
import logging
import time
from collections import deque
from typing import Protocol

from deployments.replica.embed import EmbedEngine
from deployments.replica.engine import Engine
from deployments.stage.link import StageLink

logger = logging.getLogger(__name__)

# More losses than this in the window, and the replica gives up: what kills its stages will do so again. The window is
# wide enough for losses that only a step's deadline tells.
_MAX_LOSSES = 5
_WINDOW_S = 600.0


class Stages(Protocol):
    """What can be repaired; see :class:`deployments.stage.group.StageGroup`."""

    async def repair(self) -> tuple[StageLink, list[int]]:
        """A link to stages that all live, and which of them are new."""


class Supervisor:
    """Watches one engine and its link until it gives up; ``given_up`` then says why.

    An engine of embeddings is given up at its first loss: its requests are small, and go to another replica.
    """

    def __init__(self, engine: Engine | EmbedEngine, stages: Stages, link: StageLink) -> None:
        self.given_up: str | None = None
        self._engine = engine
        self._stages = stages
        self._link = link
        self._losses: deque[float] = deque(maxlen=_MAX_LOSSES + 1)

    async def run(self) -> None:
        """Repair after every loss, until there were too many or the engine cannot go on."""
        while self.given_up is None:
            reason = await self._wait_loss()
            if isinstance(self._engine, EmbedEngine) or not self._engine.recoverable:
                await self._give_up(reason)
            else:
                await self._repair(self._engine, reason)

    async def _repair(self, engine: Engine, reason: str) -> None:
        begin = time.monotonic()
        while self.given_up is None:
            if self._lost_too_often():
                await self._give_up(f"stages were lost {len(self._losses)} times within {_WINDOW_S:g} s: {reason}")
                return
            try:
                await self._link.close()
                self._link, replaced = await self._stages.repair()
                await engine.recover(self._link)
            except Exception:
                logger.exception("the stages could not be repaired; trying again")
                continue
            logger.warning("stages %s were replaced in %.2f s: %s", replaced, time.monotonic() - begin, reason)
            return

    def _lost_too_often(self) -> bool:
        self._losses.append(time.monotonic())
        return len(self._losses) > _MAX_LOSSES and self._losses[-1] - self._losses[0] < _WINDOW_S

    async def _wait_loss(self) -> str:
        lost = asyncio.create_task(self._link.wait_lost())
        failed = asyncio.create_task(self._engine.wait_failed())
        try:
            await asyncio.wait((lost, failed), return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                self._engine.report_loss(str(lost.result()))
            return await self._engine.wait_failed()
        finally:
            for task in (lost, failed):
                task.cancel()

    async def _give_up(self, reason: str) -> None:
        self.given_up = reason
        logger.error("this replica gives up: %s", reason)
        await self._engine.stop()
