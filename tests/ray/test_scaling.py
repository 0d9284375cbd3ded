"""Replicas follow the load: more while prompt tokens wait, fewer afterwards, and no request is lost on the way."""

import threading
import time

import openai

from tests.support.running import Cluster

PROMPT = list(range(30, 230))
WAIT_S = 150


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
    done = threading.Event()
    errors: list[Exception] = []

    def ask(lane: int) -> None:
        with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
            number = 0
            while not done.is_set():
                number += 1
                prompt = [30 + (lane * 31 + number * 7 + token) % 200 for token in PROMPT]
                try:
                    client.completions.create(model="tiny", prompt=prompt, max_tokens=16)
                except openai.OpenAIError as error:
                    errors.append(error)

    lanes = [threading.Thread(target=ask, args=(lane,)) for lane in range(16)]
    try:
        cluster.up()
        assert num_replicas(cluster) == 1
        for lane in lanes:
            lane.start()
        wait_for_replicas(cluster, 2)
        done.set()
        wait_for_replicas(cluster, 1)
    finally:
        done.set()
        for lane in lanes:
            if lane.ident is not None:
                lane.join()
        cluster.config.write_text(original)
        cluster.up()
    assert not errors
