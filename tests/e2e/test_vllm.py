"""``engine: vllm`` from the YAML to the answer, with a real model; runs where ``--vllm-python`` is given."""

import concurrent.futures
import threading
from collections.abc import Iterator

import openai
import psutil
import pytest
import yaml

from tests.e2e.test_quickstart import QUICKSTART, STORAGE
from tests.support.running import Cluster, write_cluster

pytestmark = pytest.mark.e2e

PROMPT = "The capital of France is"
PROCESS = "deployments.stage.vllm_process"


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One model, computed by vLLM without compiling; nothing of vLLM may be left afterwards."""
    python = request.config.getoption("--vllm-python")
    if python is None:
        pytest.skip("needs --vllm-python")
    model = yaml.safe_load(QUICKSTART.read_text())["models"][0]
    model["engine"] = {"kind": "vllm", "python": python, "compile": False}
    model["pipeline"] = {"stages": 1, "threads": 1}  # more would busy-wait on the cores of the client
    model["context_tokens"] = 1024
    cluster = write_cluster(tmp_path_factory.mktemp("vllm"), "vllm-test", [model])
    cluster.edit(lambda values: values.update(storage=str(STORAGE)))
    try:
        said = cluster.up()
        assert "Paris" in said
        yield cluster
    finally:
        cluster.down()
    psutil.wait_procs(vllm_processes(), timeout=10)
    assert not vllm_processes()


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0, timeout=300) as client:
        yield client


def vllm_processes() -> list[psutil.Process]:
    return [each for each in psutil.process_iter(["cmdline"]) if PROCESS in (each.info["cmdline"] or [])]


def test_a_greedy_answer_streams_as_it_is_whole(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="smollm2", prompt=PROMPT, temperature=0, max_tokens=16)
    stream = client.completions.create(
        model="smollm2", prompt=PROMPT, temperature=0, max_tokens=16, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "Paris" in whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 16


def test_sampling_follows_its_seed_and_choices_differ(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        answer = client.completions.create(
            model="smollm2", prompt="Once", temperature=1.0, top_p=0.9, max_tokens=12, n=3, seed=seed
        )
        return [choice.text for choice in answer.choices]

    first = ask(7)
    assert len(set(first)) == 3
    assert ask(7) == first
    assert ask(8) != first


def test_stops_and_logprobs_are_those_of_the_api(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="smollm2", prompt=PROMPT, temperature=0, max_tokens=40, stop=["."], logprobs=2
    )
    choice = found.choices[0]
    assert choice.finish_reason == "stop"
    assert "." not in choice.text
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    assert all(max(top.values()) >= chosen for top, chosen in
               zip(choice.logprobs.top_logprobs, choice.logprobs.token_logprobs, strict=True))  # fmt: skip


def test_what_vllm_is_not_given_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="constrain") as refused:
        client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "hello"}],
            response_format={"type": "json_object"},
            max_tokens=10,
        )
    assert refused.value.param == "response_format"


def test_a_client_that_leaves_frees_its_place(cluster: Cluster, client: openai.OpenAI) -> None:
    with client.completions.create(
        model="smollm2", prompt=PROMPT, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    answer = client.completions.create(model="smollm2", prompt=PROMPT, temperature=0, max_tokens=4)
    assert answer.usage.completion_tokens == 4


def test_streams_go_on_when_vllm_is_killed(client: openai.OpenAI) -> None:
    begun = threading.Barrier(5)

    def stream(number: int) -> int:
        events = client.completions.create(
            model="smollm2", prompt=f"{number} {PROMPT}", temperature=0, max_tokens=400, stream=True,
            extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
        )  # fmt: skip
        next(iter(events))
        begun.wait(timeout=60)
        return list(events)[-1].usage.completion_tokens

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream, number) for number in range(4)]
        begun.wait(timeout=60)
        (process,) = vllm_processes()
        process.kill()
        assert [each.result() for each in streams] == [400] * 4
    (again,) = vllm_processes()
    assert again.pid != process.pid
