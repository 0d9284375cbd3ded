"""An event loop of its own in a thread of its own: coroutines in, their results back to the loop that asked.

Serve runs a replica's code on a loop that it chose. The gateway's hot path has this one, of the fastest kind.
"""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

AnyResult = TypeVar("AnyResult")


class LoopThread:
    """Runs until :meth:`stop`, or until the process ends."""

    def __init__(self, name: str) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def run(self, work: Coroutine[Any, Any, AnyResult]) -> AnyResult:
        """The result of ``work``, done on this thread's loop; cancelling the caller cancels it."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def stop(self) -> None:
        """End the loop with what runs on it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)
        self._loop.close()
