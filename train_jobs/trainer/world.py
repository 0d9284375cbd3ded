"""The workers of one attempt, as one of them sees it: its place, its device, sums over all."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist

_ALONE = ContextVar("alone", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Worker ``rank`` of ``size``. With more than one, torch.distributed's default group is the same workers."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device | None = None) -> "World":
        """The default process group, or a single worker where there is none, and inside :func:`alone`."""
        joined = dist.is_available() and dist.is_initialized() and not _ALONE.get()
        return cls(
            rank=dist.get_rank() if joined else 0,
            size=dist.get_world_size() if joined else 1,
            device=device or torch.device("cpu"),
        )

    def sum(self, values: list[float]) -> list[float]:
        """Each of ``values`` summed over all workers, in float64; every worker gets the same bits."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block this worker does by itself what workers otherwise share."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)
