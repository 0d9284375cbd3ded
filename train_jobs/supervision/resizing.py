"""When a running group of workers changes its size: what would fit, over time, in; whether to resize out.

Growing costs a restart of every worker, so room must have been there for a while, without a break. A node that is
about to be taken away is left at once.
"""

from collections.abc import Collection

from train_jobs.supervision.room import largest


class Resizing:
    """The hysteresis of one run; times are those of any steady clock, seconds."""

    def __init__(self, sizes: Collection[int], *, delay_s: float) -> None:
        self._sizes = tuple(sizes)
        self._delay_s = delay_s
        self._room_since: float | None = None

    def restarted(self) -> None:
        """A new group begins: what was seen before counts no more."""
        self._room_since = None

    def should(self, *, size: int, places: int, on_leaving_nodes: bool, now: float) -> bool:
        """Whether the group of ``size`` should save and make way; ``places`` are those of the next one."""
        if on_leaving_nodes:
            return True
        best = largest(self._sizes, places)
        if best is None or best <= size:
            self._room_since = None
            return False
        if self._room_since is None:
            self._room_since = now
        return now - self._room_since >= self._delay_s
