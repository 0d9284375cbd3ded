"""Replicas follow the load: more while prompt tokens wait, fewer afterwards, and no request is lost on the way."""

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


def num_replicas(cluster: Cluster) -> int:
    (model,) = (model for model in cluster.status()["models"] if model["name"] == "tiny")
    return sum(replica["state"] == "RUNNING" for version in model["versions"] for replica in version["replicas"])


def wait_for_replicas(cluster: Cluster, count: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while num_replicas(cluster) != count:
        assert time.monotonic() < deadline, f"there were never {count} replicas"
        time.sleep(1)


def test_replicas_follow_waiting_tokens_up_and_down(cluster: Cluster) -> None:
    original = cluster.config.read_text()
    scaling = {"min": 1, "max": 2, "target_waiting_tokens": 100, "upscale_delay": "1s", "downscale_delay": "3s"}
    cluster.edit(
        lambda values: values["models"][0].update(
            replicas=scaling, batching={"max_running": 2, "max_step_tokens": 32, "max_waiting": 100}
        )
    )
    try:
        cluster.up()
        assert num_replicas(cluster) == 1
        with traffic(cluster.url, ASKS, lanes=16):
            wait_for_replicas(cluster, 2)
        wait_for_replicas(cluster, 1)
    finally:
        cluster.config.write_text(original)
        cluster.up()
