"""Tools and structured output through OpenAI's own client, over a real socket."""

import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from deployments.gateway.app import create_app
from deployments.messages import ChatPrompt, Generate, Grammar, Refused, ToolUse
from tests.support.fake_backend import FakeBackend
from tests.support.gateway_server import serving

ASK: list[Any] = [{"role": "user", "content": "Weather in Oslo and Rome?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "now", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "time", "strict": True}},
]
TWO_CALLS = (
    'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo \u2028"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)


class Answer(BaseModel):
    """What the model is to write."""

    city: str
    degrees: int
    sky: Literal["clear", "grey"]


@pytest.fixture
async def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[AsyncOpenAI]:
    async with serving(create_app(backend)) as (host, port):
        http = httpx2.AsyncClient(verify=False)
        base_url = f"http://{host}:{port}/v1"
        async with AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0, http_client=http) as client:
            yield client


def generate(backend: FakeBackend) -> Generate:
    request = backend.requests[-1]
    assert isinstance(request, Generate)
    return request


async def test_a_pydantic_model_is_the_schema_and_the_answer(client: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.says = '{"city":"Oslo","degrees":3,"sky":"grey"}'
    answer = await client.chat.completions.parse(model="writer", messages=ASK, response_format=Answer)
    assert answer.choices[0].message.parsed == Answer(city="Oslo", degrees=3, sky="grey")
    grammar = generate(backend).sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.lenient, grammar.param) == ("json_schema", False, "response_format")
    assert list(json.loads(grammar.text)["properties"]) == ["city", "degrees", "sky"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar(kind="json_schema", text='{"type": "object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            Grammar(kind="json_schema", text='{"not": {}}', lenient=True),
        ),
        (
            {"structured_outputs": {"json": '{"enum": [1]}'}},
            Grammar(kind="json_schema", text='{"enum": [1]}', param="structured_outputs"),
        ),
        ({"structured_outputs": {"regex": "a+"}}, Grammar(kind="regex", text="a+", param="structured_outputs")),
        (
            {"structured_outputs": {"choice": ["yes", 'n"o']}},
            Grammar(kind="lark", text='start: "yes" | "n\\"o"', param="structured_outputs"),
        ),
        (
            {"structured_outputs": {"grammar": 'start: "a"'}},
            Grammar(kind="lark", text='start: "a"', param="structured_outputs"),
        ),
        (
            {"structured_outputs": {"json_object": True}},
            Grammar(kind="json_schema", text='{"type": "object"}', param="structured_outputs"),
        ),
    ],
)
async def test_every_way_to_ask_for_a_form(
    client: AsyncOpenAI, backend: FakeBackend, given: dict[str, Any], expected: Grammar | None
) -> None:
    await client.chat.completions.create(model="writer", messages=ASK, extra_body=given)
    assert generate(backend).sampling.grammar == expected
    await client.completions.create(model="writer", prompt="x", extra_body=given)
    assert generate(backend).sampling.grammar == expected


async def test_what_the_model_cannot_enforce_is_a_400(client: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.refuse = Refused(request_id="", code="invalid_request", message="because", param="response_format")
    with pytest.raises(openai.BadRequestError, match="because") as caught:
        await client.chat.completions.parse(model="writer", messages=ASK, response_format=Answer)
    assert caught.value.param == "response_format"


async def test_calls_of_a_whole_answer(client: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.says = TWO_CALLS
    answer = await client.chat.completions.create(model="writer", messages=ASK, tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    calls = choice.message.tool_calls
    assert calls is not None
    assert [(call.type, call.function.name, call.function.arguments) for call in calls] == [
        ("function", "weather", '{"city": "Oslo \u2028"}'),
        ("function", "time", "{}"),
    ]
    assert len({call.id for call in calls}) == 2
    assert generate(backend).tools == ToolUse(strict=("time",))
    prompt = generate(backend).prompt
    assert isinstance(prompt, ChatPrompt)
    assert [json.loads(tool)["function"] for tool in prompt.tools] == [
        {"name": "weather", "description": "now", "parameters": PARAMETERS},
        {"name": "time", "parameters": {"type": "object", "properties": {}}},
    ]


async def test_the_stream_of_calls_equals_the_whole_answer(client: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.says = TWO_CALLS
    options: Any = {"model": "writer", "messages": ASK, "tools": TOOLS, "n": 2}
    whole = await client.chat.completions.create(**options)
    async with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        chunks = [event.chunk async for event in stream if event.type == "chunk"]
        streamed = await stream.get_final_completion()
    assert len(chunks) > 20, "arguments come in pieces"
    for index in range(2):
        first, second = whole.choices[index], streamed.choices[index]
        assert (second.finish_reason, second.message.content) == ("tool_calls", first.message.content)
        assert [(call.function.name, call.function.arguments) for call in second.message.tool_calls or ()] == [
            (call.function.name, call.function.arguments) for call in first.message.tool_calls or ()
        ]
    pieces = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    named = [piece for piece in pieces if piece.id is not None]
    assert len(named) == 4
    assert all(piece.function is not None and piece.function.name and piece.type == "function" for piece in named)
    assert streamed.usage == whole.usage


async def test_an_answer_without_calls_is_a_plain_one(client: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.says = "It is raining. "
    answer = await client.chat.completions.create(model="writer", messages=ASK, tools=TOOLS)
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", "It is raining. ")
    assert answer.choices[0].message.tool_calls is None
    stream = await client.chat.completions.create(model="writer", messages=ASK, tools=TOOLS, stream=True)
    deltas = [choice.delta async for chunk in stream for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "It is raining. "
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]


async def test_a_call_that_was_cut_off_says_length(client: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.says = TWO_CALLS
    answer = await client.chat.completions.create(model="writer", messages=ASK, tools=TOOLS, max_tokens=60)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert answer.choices[0].finish_reason == "length"
    assert call.function.name == "weather"
    assert '{"city": "Oslo'.startswith(call.function.arguments)
    assert call.function.arguments


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ToolUse(strict=("time",))),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ToolUse(parallel=False, strict=("time",))),
        ({"tool_choice": "required"}, ToolUse(required=True, strict=("time",))),
        (
            {"tool_choice": {"type": "function", "function": {"name": "time"}}},
            ToolUse(required=True, name="time", parallel=False, strict=("time",)),
        ),
        ({"tool_choice": "none"}, None),
    ],
)
async def test_the_choice_of_tools_reaches_the_model(
    client: AsyncOpenAI, backend: FakeBackend, given: dict[str, Any], expected: ToolUse | None
) -> None:
    await client.chat.completions.create(model="writer", messages=ASK, tools=TOOLS, **given)
    request = generate(backend)
    assert request.tools == expected
    assert isinstance(request.prompt, ChatPrompt)
    assert bool(request.prompt.tools) == (expected is not None)


async def test_a_conversation_with_results_reaches_the_model(client: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.says = TWO_CALLS
    answer = await client.chat.completions.create(model="writer", messages=ASK, tools=TOOLS)
    message = answer.choices[0].message
    assert message.tool_calls is not None
    results: list[Any] = [
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "3 degrees"}]}
        for call in message.tool_calls
    ]
    await client.chat.completions.create(model="writer", messages=[*ASK, message.model_dump(), *results], tools=TOOLS)
    prompt = generate(backend).prompt
    assert isinstance(prompt, ChatPrompt)
    _, called, first, second = prompt.messages
    assert (called["role"], called["content"]) == ("assistant", "I look.")
    assert [call["function"]["name"] for call in called["tool_calls"]] == ["weather", "time"]
    assert first == {"role": "tool", "content": "3 degrees", "tool_call_id": message.tool_calls[0].id}
    assert second["tool_call_id"] == message.tool_calls[1].id


async def test_mistral_gets_ids_of_nine_characters(client: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.says, backend.tool_format = '[TOOL_CALLS]time[ARGS]{"zone": "UTC"}', "mistral"
    answer = await client.chat.completions.create(model="writer", messages=ASK, tools=TOOLS)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("time", '{"zone": "UTC"}')
    assert len(call.id) == 9
    assert call.id.isalnum()
    assert answer.choices[0].message.content is None


async def test_logprobs_come_with_calls(client: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.says = TWO_CALLS
    stream = await client.chat.completions.create(
        model="writer", messages=ASK, tools=TOOLS, logprobs=True, stream=True
    )
    tokens = [
        entry.token
        async for chunk in stream
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content or ()
    ]
    assert "".join(tokens) == TWO_CALLS
