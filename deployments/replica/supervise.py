"""Keeps an engine on living stages: a loss comes in, the stages are repaired, the engine goes on where it was.

The unit of recovery is the sequence: prompt, parameters and emitted tokens. Everything else is recomputed, so a
stream pauses and then continues with the very token that would have come.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection
from typing import Protocol

from deployments.replica.embed import EmbedEngine
from deployments.replica.engine import Engine
from deployments.replica.observe import NoTelemetry, RecoveryTelemetry
from deployments.stage.link import Repair, StageLink

logger = logging.getLogger(__name__)

# What kills its stages without a token in between will do so again; and a crowd of losses says that this is no place
# for a replica. The window is wide enough for losses that only a step's deadline tells.
_MAX_LOSSES_IN_A_ROW = 5
_MAX_LOSSES = 20
_WINDOW_S = 600.0
_RETRY_S = 0.5
_BLAME_S = 0.05


class Stages(Protocol):
    """What can be repaired; see :class:`deployments.stage.group.StageGroup`."""

    async def repair(self, suspects: Collection[int]) -> Repair:
        """A link to stages that all live; those in ``suspects`` are replaced in any case."""


class Supervisor:
    """Watches one engine and its link until it gives up; ``given_up`` then says why."""

    def __init__(
        self,
        engine: Engine | EmbedEngine,
        stages: Stages,
        link: StageLink,
        telemetry: RecoveryTelemetry | None = None,
    ) -> None:
        self.given_up: str | None = None
        self._engine = engine
        self._stages = stages
        self._link = link
        self._telemetry = telemetry or NoTelemetry()
        self._losses: deque[float] = deque(maxlen=_MAX_LOSSES + 1)
        self._num_in_a_row = 0
        self._num_results = 0

    async def run(self) -> None:
        """Repair after every loss; returns when there were too many or the engine cannot go on."""
        while self.given_up is None:
            reason, quiet_s = await self._wait_loss()
            if self._engine.recoverable:
                await self._repair(reason, quiet_s)
            else:
                self._give_up(reason)

    async def _repair(self, reason: str, quiet_s: float | None) -> None:
        suspects = frozenset(self._link.suspects)
        await self._link.close()
        while self.given_up is None:
            excess = self._count_loss()
            if excess is not None:
                self._give_up(f"{excess}: {reason}")
                return
            try:
                repair = await self._stages.repair(suspects)
            except Exception:
                logger.exception("the stages could not be repaired; trying again")
                await asyncio.sleep(_RETRY_S)
                continue
            self._link = repair.link
            begin = time.monotonic()
            await self._engine.recover(repair.link)
            self._report(reason, repair, quiet_s, time.monotonic() - begin)
            return

    def _report(self, reason: str, repair: Repair, quiet_s: float | None, reset_s: float) -> None:
        parts = {"spawn": repair.spawn_s, "load": repair.load_s, "connect": repair.connect_s + reset_s}
        if quiet_s is not None:
            parts = {"detect": quiet_s} | parts
        self._telemetry.recovered(len(repair.replaced), parts)
        shown = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
        logger.warning("stages %s were replaced (%s): %s", list(repair.replaced), shown, reason)

    def _count_loss(self) -> str | None:
        """One more loss; returns why it is one too many, None while it is not."""
        num_results = self._engine.stats().num_results
        self._num_in_a_row = 1 if num_results > self._num_results else self._num_in_a_row + 1
        self._num_results = num_results
        now = time.monotonic()
        self._losses.append(now)
        if self._num_in_a_row > _MAX_LOSSES_IN_A_ROW:
            return f"stages were lost {self._num_in_a_row} times without a token in between"
        if len(self._losses) > _MAX_LOSSES and now - self._losses[0] < _WINDOW_S:
            return f"stages were lost {len(self._losses)} times within {_WINDOW_S:g} s"
        return None

    async def _wait_loss(self) -> tuple[str, float | None]:
        """Why the engine stands still, and how long before that the lost stage was heard last, where it is known."""
        lost = asyncio.create_task(self._link.wait_lost())
        failed = asyncio.create_task(self._engine.wait_failed())
        quiet_s = None
        try:
            await asyncio.wait((lost, failed), return_when=asyncio.FIRST_COMPLETED)
            if not lost.done():  # the engine noticed first; the link knows who it was in a moment, if anybody
                await asyncio.wait((lost,), timeout=_BLAME_S)
            if lost.done():
                quiet_s = self._link.quiet_s(lost.result().stage)
                self._engine.report_loss(str(lost.result()))
            return await self._engine.wait_failed(), quiet_s
        finally:
            for task in (lost, failed):
                task.cancel()

    def _give_up(self, reason: str) -> None:
        self.given_up = reason
        logger.error("this replica gives up: %s", reason)
