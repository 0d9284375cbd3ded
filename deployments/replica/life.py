"""What both engines live through: they start, may lose their stages and get others, drain, and stop.

Two tasks do an engine's work, ``_pump`` and ``_receive_outputs``. Whatever ends one of them marks the engine as
failed: recoverable when the stages are lost, and not when the engine itself is at fault.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import ClassVar, Literal

from deployments.messages import RefusalCode, refuse
from deployments.replica.link import LINK_ERRORS

logger = logging.getLogger(__name__)

OnStageFailure = Literal["refuse", "hold"]
"""When the stages are lost, requests end with a refusal at once, or wait for others."""


class EngineLife(ABC):
    """Start, serve, drain, stop - in that order, in one event loop."""

    _lost_code: ClassVar[RefusalCode]
    """How requests are refused whose stages are lost."""

    def __init__(self, on_stage_failure: OnStageFailure) -> None:
        self.failed: str | None = None
        """Why the stages cannot be used; None while they can."""
        self.recoverable = True
        """Whether ``recover`` may mend the failure; False when the engine itself is at fault."""
        self._on_stage_failure = on_stage_failure
        self._failure = asyncio.Event()
        self._draining = False
        self._wake = asyncio.Event()
        """The pump has something to do."""
        self._sent = asyncio.Event()
        """The receiver has something to wait for."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_recoveries = 0
        self._tasks: list[asyncio.Task[None]] = []

    @abstractmethod
    async def _pump(self) -> None:
        """Send work while the stages have room for it, for ever."""

    @abstractmethod
    async def _receive_outputs(self) -> None:
        """Take what the stages answer, for ever."""

    @abstractmethod
    def _refuse_all(self, code: RefusalCode, message: str) -> None:
        """End every request."""

    async def start(self) -> None:
        """Begin to serve."""
        assert not self._tasks, "the engine is running already; this is a bug"
        self._tasks = [asyncio.create_task(self._guard(work)) for work in (self._pump, self._receive_outputs)]

    def stop_admitting(self) -> None:
        """Refuse new requests from now on, and say so in ``load``."""
        self._draining = True

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for those under way; what is left after ``timeout_s`` ends as ``draining``."""
        self.stop_admitting()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        self._refuse_all("draining", "this replica is being stopped; send the request again")

    async def stop(self) -> None:
        """End every request and all work; the link stays the caller's to close."""
        self.stop_admitting()
        await self._cancel_tasks()
        self._refuse_all("draining", "this replica was stopped; send the request again")

    async def wait_failed(self) -> str:
        """Return, as soon as the stages cannot be used, why."""
        await self._failure.wait()
        assert self.failed is not None
        return self.failed

    def report_loss(self, reason: str) -> None:
        """Somebody else saw the stages die, perhaps while they had nothing to do."""
        self._fail(f"the stages are lost: {reason}")

    async def _resume(self) -> None:
        """Work again, over stages that are new."""
        self.failed = None
        self._failure.clear()
        self._num_recoveries += 1
        self._sent.clear()
        self._wake.set()
        await self.start()

    async def _cancel_tasks(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run one of the two tasks; whatever ends it is a failure, for the health check to see."""
        try:
            await work()
        except LINK_ERRORS as error:
            self.report_loss(str(error))
        except Exception as error:
            logger.exception("the engine failed")
            self._fail(f"the engine failed: {error!r}; this is a bug", recoverable=False)

    def _fail(self, message: str, *, recoverable: bool = True) -> None:
        if self.failed is not None:
            return
        logger.error("%s", message)
        self.failed = message
        self.recoverable = recoverable
        self._failure.set()
        if self._on_stage_failure == "refuse":
            self._refuse_all(self._lost_code, message)

    def _check_usable(self, request_id: str) -> None:
        """Raise RequestRefused when no request may come in."""
        if self._draining:
            raise refuse(request_id, "draining", "this replica is being stopped; send the request again")
        if self.failed is not None and self._on_stage_failure == "refuse":
            raise refuse(request_id, self._lost_code, self.failed)
