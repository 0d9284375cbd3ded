"""Whether this gateway process is being stopped, and until when the requests under way may go on.

Every wait of a request runs under :meth:`Closing.limit`, so that one call shortens all of them at once.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.gateway.errors import ApiError


class Closing:
    """Open until :meth:`begin`; times are of the running loop's clock."""

    def __init__(self) -> None:
        self._stop_at: float | None = None
        self._limits: set[asyncio.Timeout] = set()

    @property
    def is_closing(self) -> bool:
        """Whether new connections are no longer wanted; those that exist are told so with their next answer."""
        return self._stop_at is not None

    def begin(self, patience_s: float) -> None:
        """Let requests under way go on for ``patience_s``, not longer."""
        self._stop_at = asyncio.get_running_loop().time() + patience_s
        for limit in self._limits:
            when = limit.when()
            if when is not None and when > self._stop_at:
                limit.reschedule(self._stop_at)

    @asynccontextmanager
    async def limit(self, deadline: float) -> AsyncIterator[None]:
        """TimeoutError at ``deadline``; ApiError ``draining`` where the process stops before that."""
        until = deadline if self._stop_at is None else min(deadline, self._stop_at)
        try:
            async with asyncio.timeout_at(until) as limit:
                self._limits.add(limit)
                try:
                    yield
                finally:
                    self._limits.discard(limit)
        except TimeoutError as error:
            if self._stop_at is None or self._stop_at >= deadline or not limit.expired():
                raise
            message = "This gateway is being replaced or stopped and the answer took longer than its drain timeout."
            raise ApiError("draining", message, retry_after_s=1.0) from error
