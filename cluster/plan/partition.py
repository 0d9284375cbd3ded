"""Layers to stages: the cost of every layer in, contiguous half-open ranges out, such that the slowest is fastest."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from cluster.errors import PlanError
from cluster.plan.types import ModelFacts

Range = tuple[int, int]
"""Layers ``start .. stop`` of one stage."""


def layer_costs(facts: ModelFacts) -> tuple[int, ...]:
    """Work per token of each layer, in parameters touched; the output head counts with the last layer.

    A matrix product touches each parameter once per token, so their number estimates the time. The embedding is a
    table look-up: memory, but next to no work. A tied head does the work of the embedding's whole table.
    """
    head = facts.embedding_params if facts.tied_head else facts.head_params
    costs = list(facts.layer_params)
    costs[-1] += head if facts.task == "generate" else 0
    return tuple(costs)


def balance(costs: Sequence[int], num_stages: int) -> tuple[Range, ...]:
    """Cut ``costs`` into ``num_stages`` contiguous, non-empty ranges with the smallest possible largest sum.

    Among equally good cuts, the one whose sums differ least (smallest sum of squares), so that no stage waits more
    than it must. Dynamic programming, O(num_stages x layers^2). Raises ValueError unless 1 <= num_stages <= layers.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(f"cannot cut {len(costs)} layers into {num_stages} stages")
    prefix = (0, *accumulate(costs))
    return _most_even_cut(prefix, num_stages, _smallest_peak(prefix, num_stages))


def _smallest_peak(prefix: Sequence[int], num_stages: int) -> int:
    num_layers = len(prefix) - 1
    peaks: list[int] = [prefix[stop] for stop in range(num_layers + 1)]  # of the first `stop` layers in one stage
    for stage in range(2, num_stages + 1):
        peaks = [0] * stage + [
            min(max(peaks[cut], prefix[stop] - prefix[cut]) for cut in range(stage - 1, stop))
            for stop in range(stage, num_layers + 1)
        ]
    return peaks[num_layers]


def _most_even_cut(prefix: Sequence[int], num_stages: int, peak: int) -> tuple[Range, ...]:
    """The cut with the smallest sum of squares among those in which no stage costs more than ``peak``."""
    num_layers = len(prefix) - 1
    best: dict[int, tuple[int, tuple[Range, ...]]] = {0: (0, ())}
    for _ in range(num_stages):
        following: dict[int, tuple[int, tuple[Range, ...]]] = {}
        for start, (squares, ranges) in best.items():
            for stop in range(start + 1, num_layers + 1):
                cost = prefix[stop] - prefix[start]
                if cost > peak:
                    break
                candidate = squares + cost * cost
                if stop not in following or candidate < following[stop][0]:
                    following[stop] = (candidate, (*ranges, (start, stop)))
        best = following
    return best[num_layers][1]


def explicit(split: Sequence[int], facts: ModelFacts, *, path: str) -> tuple[Range, ...]:
    """Ranges of a written ``split`` such as ``[19, 11]``; PlanError (naming ``path``) when it is not all layers."""
    if sum(split) != facts.num_layers:
        raise PlanError(
            f"{path}.split: {list(split)} is {sum(split)} layers, but the model has {facts.num_layers}; "
            f"write numbers that add up to {facts.num_layers}, or null to balance by cost"
        )
    bounds = (0, *accumulate(split))
    return tuple(pairwise(bounds))


def cut_layers(facts: ModelFacts, num_stages: int, *, path: str) -> tuple[Range, ...]:
    """Balanced ranges for ``num_stages`` stages; PlanError (naming ``path``) when there are fewer layers."""
    if num_stages > facts.num_layers:
        raise PlanError(
            f"{path}.stages: {num_stages} stages but only {facts.num_layers} layers; "
            f"set stages to {facts.num_layers} or less"
        )
    return balance(layer_costs(facts), num_stages)
