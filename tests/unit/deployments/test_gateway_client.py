"""OpenAI's own Python client against the gateway, over a real socket."""

import base64
from collections.abc import AsyncIterator

import httpx2
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI

from deployments.gateway.answers import TextOffsets, completion_logprobs
from deployments.gateway.app import create_app
from deployments.messages import ChatPrompt, ChosenLogprob, Refused, TokenLogprob, TokenPrompt
from tests.support.fake_backend import DIMENSIONS, FakeBackend, expected_text, route
from tests.support.gateway_server import serving

HELLO = [{"role": "user", "content": "hello"}]
RENDERED = "<user>hello"


@pytest.fixture
async def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[AsyncOpenAI]:
    async with serving(create_app(backend)) as (host, port):
        http = httpx2.AsyncClient(verify=False)  # spares loading certificates for every test
        base_url = f"http://{host}:{port}/v1"
        async with AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0, http_client=http) as client:
            yield client


async def test_chat_completion(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="writer", messages=HELLO, max_tokens=6, seed=3)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "writer"
    assert answer.system_fingerprint == "writer-v1"
    choice = answer.choices[0]
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.message.role == "assistant"
    assert choice.message.content == expected_text(RENDERED, 3, 0, 6)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 6, 17)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


async def test_chat_stream_equals_the_whole_answer(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="writer", messages=HELLO, seed=5, n=3)
    stream = await client.chat.completions.create(
        model="writer", messages=HELLO, seed=5, n=3, stream=True, stream_options={"include_usage": True}
    )
    texts, reasons, roles, usages, ids = ["", "", ""], {}, [], [], set()
    async for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        ids.add(chunk.id)
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles.append((choice.index, choice.delta.role))
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert reasons == {0: "stop", 1: "stop", 2: "stop"}
    assert sorted(index for index, role in roles if role) == [0, 1, 2]
    assert len(ids) == 1
    assert usages[-1] == whole.usage
    assert not any(usages[:-1])


async def test_choices_are_interleaved(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="writer", messages=HELLO, n=2, max_tokens=8, stream=True)
    order = [choice.index async for chunk in stream for choice in chunk.choices]
    assert order != sorted(order)


async def test_stop_strings_end_a_choice(client: AsyncOpenAI) -> None:
    full = expected_text(RENDERED, 1, 0, 20)
    stop = full[9:12]
    plain = await client.chat.completions.create(model="writer", messages=HELLO, seed=1, stop=["never", stop])
    assert plain.choices[0].finish_reason == "stop"
    assert plain.choices[0].message.content == full[: full.index(stop) + 2]
    kept = await client.chat.completions.create(
        model="writer", messages=HELLO, seed=1, stop=stop, extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].message.content == full[: full.index(stop) + 3]


async def test_extras_reach_the_backend(client: AsyncOpenAI, backend: FakeBackend) -> None:
    extras = {
        "ignore_eos": True,
        "min_tokens": 3,
        "stop_token_ids": [5, 6],
        "repetition_penalty": 1.2,
        "skip_special_tokens": False,
        "top_k": 40,
        "min_p": 0.1,
    }
    answer = await client.chat.completions.create(
        model="writer",
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]}
        ],
        max_completion_tokens=40,
        temperature=0,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"17": 3, "4": -100},
        user="alice",
        extra_body=extras,
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40
    request = backend.requests[-1]
    assert request.prompt == ChatPrompt(messages=({"role": "system", "content": "be kind"},))
    sampling = request.sampling
    assert {name: getattr(sampling, name) for name in extras} == extras | {"stop_token_ids": (5, 6)}
    assert (sampling.temperature, sampling.top_p) == (0, 0.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert sampling.logit_bias == {17: 3, 4: -100}
    assert request.max_tokens == sampling.max_tokens == 40


async def test_null_is_the_same_as_absent(client: AsyncOpenAI, backend: FakeBackend) -> None:
    nulls = dict.fromkeys(
        ["max_tokens", "temperature", "stop", "logit_bias", "seed", "tools", "response_format", "n"]
    )
    await client.chat.completions.create(model="writer", messages=HELLO, extra_body=nulls)
    await client.chat.completions.create(model="writer", messages=HELLO)
    first, second = backend.requests
    assert first.sampling == second.sampling
    assert first.max_tokens is None


async def test_values_that_ask_for_nothing_are_accepted(client: AsyncOpenAI) -> None:
    await client.chat.completions.create(
        model="writer", messages=HELLO, response_format={"type": "text"}, store=False, modalities=["text"]
    )
    answer = await client.chat.completions.create(model="writer", messages=HELLO)
    history = [*HELLO, answer.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
    await client.chat.completions.create(model="writer", messages=history)


async def test_chat_logprobs(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="writer", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=5
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    assert [bytes(entry.bytes or []).decode() for entry in logprobs.content] == [e.token for e in logprobs.content]
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)
    stream = await client.chat.completions.create(
        model="writer", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=5, stream=True
    )
    streamed = [
        entry
        async for chunk in stream
        for choice in chunk.choices
        for entry in (choice.logprobs.content if choice.logprobs and choice.logprobs.content else [])
    ]
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in logprobs.content]


async def test_completion_logprobs(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="writer", prompt="abc", logprobs=1, max_tokens=7, seed=2)
    block = answer.choices[0].logprobs
    assert block is not None
    text = answer.choices[0].text
    assert "".join(block.tokens or []) == text
    assert block.text_offset == list(range(len(text)))
    assert block.token_logprobs == [-0.5] * 7
    assert [set(top) for top in block.top_logprobs or []] == [{token} for token in block.tokens or []]
    stream = await client.completions.create(
        model="writer", prompt="abc", logprobs=1, max_tokens=7, seed=2, stream=True
    )
    offsets = [o async for c in stream for choice in c.choices for o in (choice.logprobs.text_offset or [])]
    assert offsets == block.text_offset


def test_tokens_of_one_character_share_its_offset() -> None:
    raws = [b"a", *(bytes([byte]) for byte in "世".encode()), "é!".encode(), b"\xff", b"z"]
    entries = [
        ChosenLogprob(TokenLogprob(i, raw.decode(errors="replace"), raw, -1.0), ()) for i, raw in enumerate(raws)
    ]
    offsets = TextOffsets()
    blocks = [completion_logprobs(part, offsets) for part in (entries[:2], entries[2:])]
    assert [*blocks[0].text_offset, *blocks[1].text_offset] == [0, 1, 1, 1, 2, 4, 5]


async def test_completions_of_several_prompts(client: AsyncOpenAI, backend: FakeBackend) -> None:
    answer = await client.completions.create(model="writer", prompt=["one", "two"], n=2, max_tokens=4, seed=1)
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [expected_text(prompt, 1, choice, 4) for prompt in ("one", "two") for choice in (0, 1)]
    assert [choice.text for choice in answer.choices] == texts
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 16)
    assert len({request.request_id for request in backend.requests}) == 2
    streamed = ["", "", "", ""]
    stream = await client.completions.create(
        model="writer", prompt=["one", "two"], n=2, max_tokens=4, seed=1, stream=True
    )
    async for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


async def test_completions_of_token_ids(client: AsyncOpenAI, backend: FakeBackend) -> None:
    await client.completions.create(model="writer", prompt=[97, 98])
    await client.completions.create(model="writer", prompt=[[97], [98]])
    assert [request.prompt.token_ids for request in backend.requests if isinstance(request.prompt, TokenPrompt)] == [
        (97, 98),
        (97,),
        (98,),
    ]
    assert backend.requests[0].max_tokens == 16


async def test_embeddings(client: AsyncOpenAI) -> None:
    floats = await client.embeddings.create(model="embedder", input=["a", "bc"], encoding_format="float")
    default = await client.embeddings.create(model="embedder", input=["a", "bc"])
    assert [item.index for item in floats.data] == [0, 1]
    assert len(floats.data[0].embedding) == DIMENSIONS
    assert [item.embedding for item in floats.data] == [item.embedding for item in default.data]
    assert (floats.usage.prompt_tokens, floats.usage.total_tokens) == (3, 3)
    one = await client.embeddings.create(model="embedder", input=[97, 98], dimensions=DIMENSIONS)
    assert len(one.data) == 1
    raw = await client.post(
        "/embeddings", body={"model": "embedder", "input": "a", "encoding_format": "base64"}, cast_to=dict
    )
    decoded = np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4")
    assert decoded.tolist() == floats.data[0].embedding


async def test_classification(client: AsyncOpenAI, backend: FakeBackend) -> None:
    answer = await client.post("/classify", body={"model": "sorter", "input": ["four", "five!"]}, cast_to=dict)
    assert answer.pop("id").startswith("classify-")
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "list",
        "model": "sorter",
        "labels": ["ham", "spam", "eggs"],
        "data": [
            {"index": 0, "label": "spam", "probs": [0.0, 1.0, 0.0], "num_classes": 3},
            {"index": 1, "label": "eggs", "probs": [0.0, 0.0, 1.0], "num_classes": 3},
        ],
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
    }
    tokens = await client.post("/classify", body={"model": "sorter", "input": [[1, 2, 3], [4]]}, cast_to=dict)
    assert [item["label"] for item in tokens["data"]] == ["ham", "spam"]
    backend.refuse = Refused(
        request_id="", code="context_length_exceeded", message="16 tokens, got 17", param="input"
    )
    with pytest.raises(openai.BadRequestError, match="16 tokens, got 17") as caught:
        await client.post("/classify", body={"model": "sorter", "input": "long"}, cast_to=dict)
    assert caught.value.param == "input"


async def test_models(client: AsyncOpenAI) -> None:
    listed = [model async for model in client.models.list()]
    assert [model.id for model in listed] == ["writer", "embedder", "sorter"]
    assert listed[0].created == 1_700_000_000
    assert await client.models.retrieve("writer") == listed[0]
    with pytest.raises(openai.NotFoundError, match="Served models: embedder, sorter, writer"):
        await client.models.retrieve("gpt-4")


async def test_an_adapter_is_a_model_with_a_parent(client: AsyncOpenAI, backend: FakeBackend) -> None:
    tuned = route("writer").model_copy(update={"model": "tuned", "parent": "writer"})
    backend.table = backend.table.model_copy(update={"routes": (*backend.table.routes, tuned)})
    parents = {model.id: model.parent async for model in client.models.list()}
    assert parents == {"writer": None, "embedder": None, "sorter": None, "tuned": "writer"}
    await client.chat.completions.create(model="tuned", messages=HELLO)
    await client.completions.create(model="writer", prompt="a")
    url = str(client.base_url).replace("/v1/", "")
    await client.post(f"{url}/tokenize", body={"model": "tuned", "prompt": "a"}, cast_to=dict)
    await client.post(f"{url}/detokenize", body={"model": "tuned", "tokens": [97]}, cast_to=dict)
    assert [request.adapter for request in backend.requests] == ["tuned", None, "tuned", "tuned"]


async def test_tokenize_and_detokenize(client: AsyncOpenAI) -> None:
    async def post(path: str, **body: object) -> dict[str, object]:
        url = str(client.base_url).replace("/v1/", path)
        return await client.post(url, body=body, cast_to=dict)

    tokens = await post("/tokenize", model="writer", prompt="hé", return_token_strs=True)
    assert tokens == {"count": 2, "max_model_len": 512, "tokens": [104, 233], "token_strs": ["h", "é"]}
    chat = await post("/tokenize", model="writer", messages=HELLO)
    assert chat["count"] == len(RENDERED)
    assert chat["token_strs"] is None
    assert await post("/detokenize", model="writer", tokens=[104, 233]) == {"prompt": "hé"}


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("invalid_request", 400, openai.BadRequestError),
        ("context_length_exceeded", 400, openai.BadRequestError),
        ("unsupported", 400, openai.BadRequestError),
        ("overloaded", 429, openai.RateLimitError),
        ("deadline_exceeded", 408, openai.APIStatusError),
        ("draining", 503, openai.InternalServerError),
        ("model_not_found", 404, openai.NotFoundError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_is_a_status(
    client: AsyncOpenAI, backend: FakeBackend, code: str, status: int, kind: type[openai.APIStatusError], stream: bool
) -> None:
    backend.refuse = Refused(request_id="r", code=code, message="because", param="prompt", retry_after_s=2.1)
    with pytest.raises(kind) as caught:
        await client.completions.create(model="writer", prompt="x", stream=stream)
    assert caught.value.status_code == status
    assert (caught.value.code, caught.value.param) == (code, "prompt")
    assert "because" in caught.value.message
    assert caught.value.response.headers["retry-after"] == "3"


async def test_an_internal_refusal_tells_the_request_id_and_keeps_the_detail_in_the_log(
    client: AsyncOpenAI, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.refuse = Refused(request_id="r", code="internal", message="10.0.0.7:41234 refused the connection")
    with pytest.raises(openai.InternalServerError) as caught:
        await client.completions.create(model="writer", prompt="x", extra_headers={"x-request-id": "trace 7"})
    assert caught.value.code == "internal"
    assert "trace 7" in caught.value.message
    assert "10.0.0.7" not in caught.value.message
    assert "10.0.0.7:41234 refused the connection" in caplog.text


async def test_a_prompt_longer_than_the_context_shows_both_numbers(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"616 tokens.* 512") as caught:
        await client.completions.create(model="writer", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"


async def test_a_failure_in_mid_stream_is_an_error_event(client: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.fail_after = 4
    stream = await client.chat.completions.create(model="writer", messages=HELLO, stream=True, seed=3)
    text = ""

    async def read_all() -> None:
        nonlocal text
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""

    with pytest.raises(openai.APIError, match=r"could not finish this request\. Request id: ") as caught:
        await read_all()
    assert text == expected_text(RENDERED, 3, 0, 4)
    assert caught.value.code == "internal"
