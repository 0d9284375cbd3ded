"""Evaluation data in, sums over all of them out: every worker passes over its share, and all get the same sums.

A batch is the same whoever computes it, and sums are integers, so the metrics do not depend on the number of workers.
Every worker makes equally many passes, as a model that is cut over workers needs all of them for each.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from train_jobs.trainer.world import World


class Sums(Protocol):
    """Something that is added up over a part of the data."""

    def __add__(self, other: Self, /) -> Self: ...


S = TypeVar("S", bound=Sums)


def sum_over_workers(num_items: int, batch_items: int, empty: S, score: Callable[[NDArray[np.int64]], S]) -> S:
    """``empty`` plus ``score`` of every batch of item numbers, shared by the workers of ``World.current``."""
    world = World.current()
    rank, size = world.rank, world.size
    batches = [np.arange(start, min(start + batch_items, num_items)) for start in range(0, num_items, batch_items)]
    total = empty
    for number in range(rank, -(-len(batches) // size) * size, size):
        sums = score(batches[min(number, len(batches) - 1)])
        if number < len(batches):
            total += sums
    if size == 1:
        return total
    gathered = [empty] * size
    dist.all_gather_object(gathered, total)
    whole: S = functools.reduce(operator.add, gathered)
    return whole


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes."""
    return next(model.parameters()).device


def to_tensor(array: NDArray[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An array of the data as the model reads it."""
    return torch.from_numpy(array).to(device=device, dtype=dtype)
