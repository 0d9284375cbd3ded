"""Stages to placement group bundles, and whether they all fit: ModelAppArgs and nodes in, a verdict out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.plan.types import ModelAppArgs, NodePlan

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
Amounts = dict[str, float]
"""Ray resource name to amount; ``memory`` in bytes."""

_SEARCH_STEPS = 20_000
"""Placements tried before the search gives up."""
_SEARCH_ITEMS = 200
"""Larger plans are placed first-fit-decreasing only, without going back; the search is one call deep per item."""
_TOLERANCE = 1e-6
"""Ray counts resources in units of 1e-4; sums of a few floats stay well inside this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """Bundles that are placed together or not at all: one replica, or one gateway process."""

    name: str
    bundles: tuple[Amounts, ...]
    strategy: Strategy


def replica_bundles(args: ModelAppArgs) -> list[Amounts]:
    """Placement group bundles of one replica, one per stage; the replica actor itself sits in bundle 0."""
    bundles: list[Amounts] = []
    for stage in args.stages:
        cpus = args.stage_cpus + (args.replica_cpus if stage.index == 0 else 0.0)
        bundle: Amounts = {"CPU": round(cpus, 4)}
        if args.stage_gpus > 0:
            bundle["GPU"] = args.stage_gpus
        if args.stage_memory:
            bundle["memory"] = float(stage.memory_bytes)
        bundles.append(bundle)
    return bundles


def replica_gang(args: ModelAppArgs) -> Gang:
    """One replica of ``args`` as a gang."""
    return Gang(name=args.model, bundles=tuple(replica_bundles(args)), strategy=args.placement_strategy)


def totals(bundles: Sequence[Amounts]) -> Amounts:
    """Sum of each resource over ``bundles``."""
    names = {name for bundle in bundles for name in bundle}
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in sorted(names)}


def fits_one(bundle: Amounts, free: Amounts) -> bool:
    """Whether a node with ``free`` resources can take ``bundle``."""
    return all(amount <= free.get(name, 0.0) + _TOLERANCE for name, amount in bundle.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Free:
    """What is left of one node: sums by resource, and the share that is left of each of its GPUs."""

    amounts: Amounts
    gpus: tuple[float, ...]

    def without(self, item: "_Item") -> "_Free | None":
        """What is left after ``item``; None when it does not fit."""
        if not fits_one(item.bundle, self.amounts):
            return None
        gpus = _gpus_after(self.gpus, item.gpus)
        if gpus is None:
            return None
        left = {name: amount - item.bundle.get(name, 0.0) for name, amount in self.amounts.items()}
        return _Free(amounts=left, gpus=gpus)


def _gpus_after(free: tuple[float, ...], shares: tuple[float, ...]) -> tuple[float, ...] | None:
    """Ray takes a share from the one GPU with the least left that has enough, and never from two."""
    if not shares:
        return free
    left = list(free)
    for share in shares:
        enough = [index for index, amount in enumerate(left) if share <= amount + _TOLERANCE]
        if not enough:
            return None
        left[min(enough, key=left.__getitem__)] -= share
    return tuple(left)


def _expand_nodes(nodes: Sequence[NodePlan], num_bundles: int) -> list[_Free]:
    """Resources of every node at its maximum count; more nodes of a group than bundles cannot help."""
    return [
        _Free(amounts=dict(node.resources), gpus=(1.0,) * int(node.resources.get("GPU", 0)))
        for node in nodes
        for _ in range(min(node.max, num_bundles))
    ]


def all_fit(gangs: Sequence[Gang], nodes: Sequence[NodePlan]) -> bool:
    """Whether an arrangement of all ``gangs`` on ``nodes`` (at their maximum counts) was found.

    First-fit with the largest gang and the largest bundle first; where that fails and the plan is small, depth-first
    search in the same order. It ends after a fixed number of steps; what was not found by then counts as none.
    """
    capacity = totals([dict(node.resources) for node in nodes])
    num_bundles = sum(len(gang.bundles) for gang in gangs)
    ordered = sorted(gangs, key=lambda gang: dominant_share(totals(gang.bundles), capacity), reverse=True)
    items = [item for index, gang in enumerate(ordered) for item in _items(index, gang, capacity)]
    free = _expand_nodes(nodes, num_bundles)
    if _first_fit(items, list(free)):
        return True
    return len(items) <= _SEARCH_ITEMS and _Search(items=items, free=free).place(0)


def dominant_share(need: Amounts, capacity: Amounts) -> float:
    """The largest fraction of any resource of ``capacity`` that ``need`` takes."""
    return max(
        (amount / capacity[name] if capacity.get(name) else amount for name, amount in need.items()), default=0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    gang: int
    bundle: Amounts
    gpus: tuple[float, ...]
    """Share of a GPU of each stage in the bundle; at most 1 each."""
    apart: bool
    """Must not share a node with another item of its gang."""


def _items(index: int, gang: Gang, capacity: Amounts) -> Iterator[_Item]:
    if gang.strategy == "STRICT_PACK":
        yield _Item(gang=index, bundle=totals(gang.bundles), gpus=_shares(gang.bundles), apart=False)
        return
    apart = gang.strategy == "STRICT_SPREAD"
    for bundle in sorted(gang.bundles, key=lambda bundle: dominant_share(bundle, capacity), reverse=True):
        yield _Item(gang=index, bundle=bundle, gpus=_shares([bundle]), apart=apart)


def _shares(bundles: Sequence[Amounts]) -> tuple[float, ...]:
    return tuple(sorted((bundle["GPU"] for bundle in bundles if bundle.get("GPU")), reverse=True))


def _first_fit(items: Sequence[_Item], free: list[_Free]) -> bool:
    """Whether every item fits the first node that takes it; ``free`` is changed."""
    used: list[set[int]] = [set() for _ in free]
    for item in items:
        for index, node in enumerate(free):
            left = None if item.apart and item.gang in used[index] else node.without(item)
            if left is not None:
                free[index] = left
                used[index].add(item.gang)
                break
        else:
            return False
    return True


class _Search:
    """Depth-first placement of ``items`` on nodes; ``free`` is changed and restored on the way."""

    def __init__(self, *, items: list[_Item], free: list[_Free]) -> None:
        self._items = items
        self._free = free
        self._used: list[set[int]] = [set() for _ in free]  # gangs that forbid company, per node
        self._steps_left = _SEARCH_STEPS

    def place(self, position: int) -> bool:
        """Whether items ``position ..`` can all be placed."""
        if position == len(self._items):
            return True
        item = self._items[position]
        tried: list[_Free] = []
        for index, free in enumerate(self._free):
            if self._steps_left <= 0:
                return False
            left = None if item.apart and item.gang in self._used[index] else free.without(item)
            if left is None:
                continue
            if not item.apart and free in tried:
                continue  # a node just like one that failed
            tried.append(free)
            if self._try_node(index, left, item, position):
                return True
        return False

    def _try_node(self, index: int, left: _Free, item: _Item, position: int) -> bool:
        self._steps_left -= 1
        before = self._free[index]
        self._free[index] = left
        if item.apart:
            self._used[index].add(item.gang)
        if self.place(position + 1):
            return True
        self._free[index] = before
        self._used[index].discard(item.gang)
        return False
