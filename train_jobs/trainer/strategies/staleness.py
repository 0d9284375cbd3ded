"""Who computes which batch, and whose gradient is applied next: free workers and arrivals in, decisions out.

The staleness of a gradient is the number of updates between the pull of the weights it was computed on and its own
update. Without a bound a gradient is applied when it arrives (Dean et al. 2012, "Large Scale Distributed Deep
Networks"). Ho et al. 2013, "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", let no
worker's clock run ahead of the slowest one's by more than a bound; here updates come one by one, so the bound is kept
for each gradient, exactly: every batch under way has a deadline, the last number of updates that may have been done
before its own, and nothing is handed out or applied that would make another one miss its deadline.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Handout:
    """Global batch number ``item``, which ``worker`` computes on the weights after ``pulled`` updates."""

    item: int
    worker: int
    pulled: int


class Handouts:
    """Batches are handed out in order, each to one worker; a worker has one at a time."""

    def __init__(self, *, first: int, max_staleness: int | None) -> None:
        """``first`` updates are done, and as many batches; ``max_staleness`` None sets no bound."""
        self._num_updates = first
        self._next = first
        self._max_staleness = max_staleness
        self._under_way: list[Handout] = []
        """Oldest weights first, and so by deadline."""
        self._arrived: set[int] = set()

    @property
    def num_under_way(self) -> int:
        """Batches that are handed out and not applied."""
        return len(self._under_way)

    def hand_out(self, worker: int, stop: int) -> Handout | None:
        """The next batch, on the weights as they are now; None while ``worker`` has to wait.

        That is when the next one is not below ``stop``, or when more than ``max_staleness`` others are under way,
        as this one could not be applied in time then.
        """
        full = self._max_staleness is not None and len(self._under_way) > self._max_staleness
        if full or self._next >= stop:
            return None
        handout = Handout(item=self._next, worker=worker, pulled=self._num_updates)
        self._next += 1
        self._under_way.append(handout)
        return handout

    def arrived(self, worker: int) -> None:
        """The gradient of ``worker``'s batch is here."""
        self._arrived.add(worker)

    def apply(self) -> tuple[Handout, int] | None:
        """The gradient to apply now, which then counts as applied, and its staleness; None while none may be.

        Of those that may be, the one with the oldest weights. That of the oldest weights of all always may be.
        """
        for place, handout in enumerate(self._under_way):
            if not self._in_time_after(place):
                return None
            if handout.worker in self._arrived:
                self._arrived.remove(handout.worker)
                del self._under_way[place]
                self._num_updates += 1
                return handout, self._num_updates - 1 - handout.pulled
        return None

    def _in_time_after(self, place: int) -> bool:
        """Whether those with older weights than the one at ``place`` meet their deadlines if it goes first.

        Those with newer weights do anyway: each deadline is met as long as they go in this order.
        """
        if self._max_staleness is None:
            return True
        after = self._num_updates + 1
        return all(
            after + number <= handout.pulled + self._max_staleness
            for number, handout in enumerate(self._under_way[:place])
        )
