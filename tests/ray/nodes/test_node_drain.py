"""A node is taken away under traffic: the stage on it is elsewhere before it goes, and no stream notices."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.control.dashboard import Dashboard
from cluster.control.observe import stage_actors
from tests.support.raylets import Raylets
from tests.support.running import TORCH, Cluster, chat_model, save_tiny_chat, write_cluster
from tests.support.steady import Traffic, wait_until

pytestmark = pytest.mark.timeout(600)
"""Ray may need more than one try to start a node on a busy machine."""


@pytest.fixture
def raylets() -> Iterator[Raylets]:
    """A cluster of three nodes that somebody else runs."""
    raylets = Raylets()
    try:
        raylets.start_head(num_cpus=2)
        raylets.add_node(num_cpus=2)
        raylets.add_node(num_cpus=2)
        yield raylets
    finally:
        raylets.stop()


@pytest.fixture
def spread(raylets: Raylets, tmp_path: Path) -> Iterator[Cluster]:
    """The tiny model over two stages on torch that may not share a node."""
    save_tiny_chat(tmp_path / "chat-a", seed=1)
    model = chat_model(str(tmp_path / "chat-a"), **TORCH)
    model["pipeline"] |= {"placement": "STRICT_SPREAD"}
    with raylets.serving(write_cluster(tmp_path, "draining", [model])) as cluster:
        yield cluster


def nodes_of_stages(raylets: Raylets) -> list[tuple[int, str]]:
    """Index and node of every living stage; one that is about to be replaced is among them."""
    actors = [actor for actor in Dashboard(raylets.dashboard_url).actors() if actor["state"] == "ALIVE"]
    named = [(stage_actors([actor]), actor["node_id"]) for actor in actors]
    return sorted((index, node_id) for found, node_id in named for _, _, index in found)


def test_a_stage_leaves_a_node_that_drains_and_no_stream_notices(raylets: Raylets, spread: Cluster) -> None:
    (_, first), (_, second) = nodes_of_stages(raylets)
    (third,) = raylets.node_ids() - {first, second}
    with Traffic(spread.url, num_lanes=2) as traffic:
        raylets.drain(second)
        wait_until(lambda: nodes_of_stages(raylets) == [(0, first), (1, third)], "the second stage on the third node")
        traffic.wait_for(4)
    assert not traffic.problems
