"""How many workers fit into the cluster: free resources by node in, a number out."""

from collections.abc import Collection, Mapping

Resources = Mapping[str, float]

_ROUNDING = 1e-6
"""Ray counts in ten-thousandths."""


def count_places(needs: Resources, free: Mapping[str, Resources]) -> int:
    """Workers that fit beside one another into what is free, node by node."""
    return sum(_on_node(needs, resources) for resources in free.values())


def _on_node(needs: Resources, free: Resources) -> int:
    fits = [int((free.get(name, 0.0) + _ROUNDING) // amount) for name, amount in needs.items() if amount > 0]
    return min(fits)


def free_again(
    free: Mapping[str, Resources], needs: Resources, nodes_of_workers: Collection[str], leaving: Collection[str]
) -> dict[str, dict[str, float]]:
    """What is free once these workers are gone, on the nodes that stay.

    ``free`` has the nodes that live; ``leaving`` are those that will be taken away.
    """
    found = {node: dict(resources) for node, resources in free.items() if node not in leaving}
    for node in nodes_of_workers:
        if node in found:
            for name, amount in needs.items():
                found[node][name] = found[node].get(name, 0.0) + amount
    return found


def largest(sizes: Collection[int], places: int) -> int | None:
    """The largest of ``sizes`` that fits into so many places."""
    return max((size for size in sizes if size <= places), default=None)


def quietest(free: Mapping[str, Resources]) -> str | None:
    """The node with the most cores free, of equal ones the first; None without nodes."""
    return max(free, key=lambda node: free[node].get("CPU", 0.0), default=None)


def describe_shortage(needs: Resources, smallest: int, free: Mapping[str, Resources]) -> str:
    """Why a run waits: what it asks for, and what there is."""
    asked = ", ".join(f"{name} {amount:g}" for name, amount in needs.items())
    there = {name: sum(resources.get(name, 0.0) for resources in free.values()) for name in needs}
    have = ", ".join(f"{name} {amount:g}" for name, amount in there.items())
    return (
        f"{smallest} worker{'s' if smallest > 1 else ''} with {asked} each do not fit; "
        f"free on {len(free)} nodes together: {have}"
    )
