"""The whole request path on a real cluster, driven by OpenAI's client and by the command line."""

import json
import re
import time
from pathlib import Path

import openai
import psutil
import pytest
import requests
from transformers import AutoModelForCausalLM

from cluster.control.drill.asks import Ask
from tests.ray.serving.conftest import LABELS
from tests.support.drilling import traffic
from tests.support.running import Cluster
from tests.support.tiny_models import greedy
from tests.support.tiny_tokenizer import byte_level_tokenizer

PROMPT = [40, 41, 200, 77, 90, 12]


@pytest.fixture(scope="module")
def client(cluster: Cluster):
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def complete(client: openai.OpenAI, **changes) -> str:
    arguments = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    extra = {"ignore_eos": True, "skip_special_tokens": False}
    return client.completions.create(**(arguments | changes), extra_body=extra).choices[0].text


def expected_text(directory: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(directory)
    return byte_level_tokenizer().decode(greedy(model, PROMPT, 24)).removesuffix("\ufffd")


def stage_pids(cluster: Cluster) -> list[int]:
    versions = [version for model in cluster.status()["models"] for version in model["versions"]]
    return [stage["pid"] for version in versions for replica in version["replicas"] for stage in replica["stages"]]


def test_greedy_text_over_two_stages_is_transformers_own(cluster: Cluster, client: openai.OpenAI) -> None:
    text = complete(client)
    assert text.rstrip("\ufffd") == expected_text(cluster.config.parent / "chat-a").rstrip("\ufffd")


def test_chat_streams_and_adds_up(client: openai.OpenAI) -> None:
    arguments = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 20,
        "seed": 5,
        "n": 3,
    }
    whole = client.chat.completions.create(**arguments)
    texts = ["", "", ""]
    usage = None
    for chunk in client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_embeddings_have_one_vector_per_input(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny-embed", input=["hello world", "hello", "world"])
    assert [len(item.embedding) for item in answer.data] == [16, 16, 16]
    assert answer.data[0].embedding != answer.data[1].embedding


def test_a_classifier_has_a_probability_for_every_label(client: openai.OpenAI) -> None:
    answer = client.post(
        "/classify", body={"model": "tiny-classify", "input": ["hello world", "world"]}, cast_to=dict
    )
    assert answer["labels"] == list(LABELS)
    for item in answer["data"]:
        assert sum(item["probs"]) == pytest.approx(1.0, abs=1e-6)
        assert item["label"] == LABELS[item["probs"].index(max(item["probs"]))]
    with pytest.raises(openai.BadRequestError, match="64 tokens, but input 0 has"):
        client.post("/classify", body={"model": "tiny-classify", "input": "hello " * 80}, cast_to=dict)
    with pytest.raises(openai.BadRequestError, match="call /v1/classify with it"):
        complete(client, model="tiny-classify")


def test_refusals_reach_the_client_with_their_reason(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny"):
        complete(client, model="nobody")
    with pytest.raises(openai.BadRequestError, match="256"):
        complete(client, prompt=[40] * 300)
    with pytest.raises(openai.BadRequestError, match="/v1/chat/completions"):
        client.embeddings.create(model="tiny", input="x")


def test_status_lists_every_stage(cluster: Cluster) -> None:
    models = {model["name"]: model for model in cluster.status()["models"]}
    (version,) = models["tiny"]["versions"]
    (replica,) = version["replicas"]
    stages = replica["stages"]
    assert [stage["index"] for stage in stages] == [0, 1]
    assert [stage["layers"] for stage in stages] == [[0, 3], [3, 4]]
    for stage in stages:
        assert psutil.pid_exists(stage["pid"])
        assert stage["resident_bytes"] > 10_000_000
        assert stage["node"]
        assert stage["state"]
    assert len(models["tiny-embed"]["versions"][0]["replicas"][0]["stages"]) == 1


def test_metrics_follow_requests_from_gateway_to_stages(cluster: Cluster, client: openai.OpenAI) -> None:
    complete(client)
    targets = json.loads((cluster.temp_dir / "prom_metrics_service_discovery.json").read_text())[0]["targets"]
    wanted = {
        'ray_manta_generation_tokens_total{.*endpoint="/v1/completions".*model="tiny"',
        'ray_manta_time_to_first_token_seconds_bucket{.*model="tiny"',
        'ray_manta_kv_cache_usage{.*model="tiny"',
        'ray_manta_stage_compute_seconds_total{.*model="tiny".*stage="0"',
        'ray_manta_stage_compute_seconds_total{.*model="tiny".*stage="1"',
    }
    deadline = time.monotonic() + 60
    while wanted:
        assert time.monotonic() < deadline, f"never exported: {wanted}"
        complete(client)
        exported = "".join(requests.get(f"http://{target}/metrics", timeout=10).text for target in targets)
        wanted = {line for line in wanted if not re.search(line, exported)}
        time.sleep(1)


def test_a_second_up_changes_nothing_and_says_so(cluster: Cluster) -> None:
    before = stage_pids(cluster)
    assert "nothing" in cluster.up().lower()
    assert stage_pids(cluster) == before


def test_a_stream_survives_the_death_of_a_stage_and_the_other_stays(cluster: Cluster, client: openai.OpenAI) -> None:
    """Each stage is killed under mixed streams in ``test_drill.py``."""
    arguments = {"model": "tiny", "prompt": PROMPT, "max_tokens": 240, "temperature": 1.0, "seed": 3, "n": 2}
    extra = {"ignore_eos": True, "skip_special_tokens": False}
    undisturbed = [choice.text for choice in client.completions.create(**arguments, extra_body=extra).choices]
    before = stage_pids(cluster)
    texts = ["", ""]
    for number, chunk in enumerate(client.completions.create(**arguments, extra_body=extra, stream=True)):
        if number == 5:
            psutil.Process(before[1]).kill()
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == undisturbed
    after = stage_pids(cluster)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_new_version_takes_over_without_a_failed_request(cluster: Cluster, client: openai.OpenAI) -> None:
    directory = cluster.config.parent
    old, new = complete(client), expected_text(directory / "chat-b")
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "skip_special_tokens": False}
    ask = Ask(kind="whole", path="/v1/completions", body=body | {"ignore_eos": True}, num_tokens=24)
    with traffic(cluster.url, [ask], lanes=2) as outcomes:
        cluster.edit(lambda values: values["models"][0].update(source=f"path://{directory / 'chat-b'}"))
        cluster.up()
    assert complete(client).rstrip("\ufffd") == new.rstrip("\ufffd")
    assert {outcome.texts[0] for outcome in outcomes} == {old, complete(client)}
    assert len(cluster.status()["models"][0]["versions"]) == 1, "the old version is gone"


def test_a_version_that_cannot_load_is_reported_and_the_old_one_serves_on(
    cluster: Cluster, client: openai.OpenAI
) -> None:
    expected = complete(client)
    good = cluster.config.read_text()
    broken = cluster.config.parent / "granite"
    if not broken.exists():
        from tests.support.tiny_models import save_tiny_model

        save_tiny_model(broken, "granite", embedding_multiplier=12.0)
        byte_level_tokenizer().save_pretrained(broken)
    cluster.edit(lambda values: values["models"][0].update(source=f"path://{broken}", kernels="auto"))
    try:
        failed = cluster.manta("up", str(cluster.config))
        assert failed.returncode == 1
        assert "cannot be sharded" in failed.stderr + failed.stdout
        assert complete(client) == expected
    finally:
        cluster.config.write_text(good)
        cluster.up()
    assert complete(client) == expected
