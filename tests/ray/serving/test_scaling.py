"""Bounds and timeouts change while replicas go on; replicas follow the load, and no request is lost on the way."""

import json
import time

from cluster.control.drill.asks import Ask
from tests.support.drilling import traffic
from tests.support.running import Cluster

WAIT_S = 150


def ask(number: int) -> Ask:
    """A long prompt that shares its beginning with no other."""
    prompt = [30 + (number * 31 + token * 7) % 200 for token in range(200)]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "ignore_eos": True}
    return Ask(kind="whole", path="/v1/completions", body=body, num_tokens=16)


ASKS = [ask(number) for number in range(200)]


def replica_ids(cluster: Cluster) -> set[str]:
    """Of those that run."""
    (model,) = (model for model in cluster.status()["models"] if model["name"] == "tiny")
    replicas = (replica for version in model["versions"] for replica in version["replicas"])
    return {replica["id"] for replica in replicas if replica["state"] == "RUNNING"}


def wait_for_replicas(cluster: Cluster, count: int) -> set[str]:
    deadline = time.monotonic() + WAIT_S
    while len(found := replica_ids(cluster)) != count:
        assert time.monotonic() < deadline, f"there were never {count} replicas"
        time.sleep(1)
    return found


def test_bounds_change_in_place_and_replicas_follow_waiting_tokens_up_and_down(cluster: Cluster) -> None:
    original = cluster.config.read_text()
    scaling = {"min": 1, "max": 2, "target_waiting_tokens": 100, "upscale_delay": "1s", "downscale_delay": "3s"}
    timeouts = {"request": "240s", "step": "30s", "drain": "20s"}
    before = replica_ids(cluster)
    assert len(before) == 1
    try:
        cluster.edit(lambda values: values["models"][0].update(replicas=scaling, timeouts=timeouts))
        actions = json.loads(cluster.manta("plan", str(cluster.config), "--json").stdout)["actions"]
        assert [action["kind"] for action in actions] == ["change_settings", "await_apps"]
        cluster.up()
        assert replica_ids(cluster) == before
        assert "Nothing to do" in cluster.up()
        with traffic(cluster.url, ASKS, lanes=32):
            assert before < wait_for_replicas(cluster, 2)
        wait_for_replicas(cluster, 1)
    finally:
        cluster.config.write_text(original)
        cluster.up()
    assert "Nothing to do" in cluster.up()
