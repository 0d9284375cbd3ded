"""The head dies and comes back, its control store kept on disk: nobody who is served notices, and control goes on."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.raylets import Raylets
from tests.support.running import Cluster, chat_model, save_tiny_chat, write_cluster
from tests.support.steady import Traffic, wait_until

pytestmark = pytest.mark.timeout(600)
"""Ray may need more than one try to start a node on a busy machine."""


@pytest.fixture
def raylets(tmp_path: Path) -> Iterator[Raylets]:
    """A head without room for anything but control, and one node that serves."""
    raylets = Raylets(
        RAY_gcs_storage="rocksdb",
        RAY_gcs_storage_path=str(tmp_path / "control-store"),
        RAY_gcs_rpc_server_reconnect_timeout_s="240",
    )
    try:
        raylets.start_head(num_cpus=0)
        raylets.add_node(num_cpus=4)
        yield raylets
    finally:
        raylets.stop()


@pytest.fixture
def attached(raylets: Raylets, tmp_path: Path) -> Iterator[Cluster]:
    save_tiny_chat(tmp_path / "chat-a", seed=1)
    model = chat_model(str(tmp_path / "chat-a"), pipeline={"stages": 1, "threads": 1})
    with raylets.serving(write_cluster(tmp_path, "head", [model])) as cluster:
        yield cluster


def test_streams_go_on_without_a_head_and_control_comes_back(raylets: Raylets, attached: Cluster) -> None:
    before = stage_pid(attached)
    with Traffic(attached.url, num_lanes=1, num_tokens=50, pause_s=0.5) as traffic:
        raylets.kill_head()
        traffic.wait_for(3)
        raylets.start_head(num_cpus=0)
        wait_until(lambda: "othing to do" in attached.manta("up", str(attached.config)).stdout, "an idle `manta up`")
        assert stage_pid(attached) == before
        psutil.Process(before).kill()
        wait_until(lambda: stage_pid(attached) not in (before, None), "another stage")
        traffic.wait_for(3)
    assert not traffic.problems


def stage_pid(cluster: Cluster) -> int | None:
    """The process of the only stage of the only replica; None while there is none."""
    (replica,) = cluster.status()["models"][0]["versions"][0]["replicas"]
    (stage,) = replica["stages"]
    return stage["pid"] if stage["state"] == "ALIVE" else None
