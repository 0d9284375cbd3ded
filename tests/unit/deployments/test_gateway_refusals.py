"""Bad input: every mistake has a status, a code and the field at fault, in OpenAI's error shape."""

import json
from typing import Any

import pytest

from deployments.gateway.app import create_app
from tests.support.fake_backend import FakeBackend
from tests.support.gateway_client import in_process

CHAT, TEXT, EMBED, CLASSIFY, TOKENS, IDS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/classify",
    "/tokenize",
    "/detokenize",
)
USER = {"role": "user", "content": "hi"}
BASES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "writer", "messages": [USER]},
    TEXT: {"model": "writer", "prompt": "hi"},
    EMBED: {"model": "embedder", "input": "hi"},
    CLASSIFY: {"model": "sorter", "input": "hi"},
    TOKENS: {"model": "writer", "prompt": "hi"},
    IDS: {"model": "writer", "tokens": [104]},
}


def message(**changes: object) -> list[dict[str, Any]]:
    return [{**USER, **changes}]


PAST = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FUNCTION = "messages[0].tool_calls[0].function"


def calls(changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "assistant", "tool_calls": [PAST | changes]}]


def tool(**changes: object) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **changes}}]


def named(name: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def schema(**changes: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", **changes}}


def nested(depth: int) -> dict[str, Any]:
    """An object of so many levels."""
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


# endpoint, what is changed in a good request, status, param, code
FIELDS: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    # the model
    (CHAT, {"model": None}, 400, "model", "missing_required_parameter"),
    (CHAT, {"model": 5}, 400, "model", "invalid_type"),
    (CHAT, {"model": "gpt-4"}, 404, "model", "model_not_found"),
    (CHAT, {"model": ""}, 404, "model", "model_not_found"),
    (CHAT, {"model": "embedder"}, 400, "model", "wrong_endpoint"),
    (EMBED, {"model": "writer"}, 400, "model", "wrong_endpoint"),
    (CHAT, {"model": "sorter"}, 400, "model", "wrong_endpoint"),
    (EMBED, {"model": "sorter"}, 400, "model", "wrong_endpoint"),
    (CLASSIFY, {"model": "writer"}, 400, "model", "wrong_endpoint"),
    (CLASSIFY, {"model": "embedder"}, 400, "model", "wrong_endpoint"),
    (TOKENS, {"model": "x" * 500}, 404, "model", "model_not_found"),
    # messages
    (CHAT, {"messages": None}, 400, "messages", "missing_required_parameter"),
    (CHAT, {"messages": []}, 400, "messages", "empty_array"),
    (CHAT, {"messages": "hi"}, 400, "messages", "invalid_type"),
    (CHAT, {"messages": ["hi"]}, 400, "messages[0]", "invalid_type"),
    (CHAT, {"messages": [USER, {"role": "user"}]}, 400, "messages[1].content", "missing_required_parameter"),
    (CHAT, {"messages": message(content=None)}, 400, "messages[0].content", "missing_required_parameter"),
    (CHAT, {"messages": message(content=5)}, 400, "messages[0].content", "invalid_type"),
    (CHAT, {"messages": message(content=[])}, 400, "messages[0].content", "empty_array"),
    (CHAT, {"messages": message(content=["hi"])}, 400, "messages[0].content[0]", "invalid_type"),
    (
        CHAT,
        {
            "messages": message(
                content=[{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u"}}]
            )
        },
        400,
        "messages[0].content[1].type",
        "unsupported_value",
    ),
    (
        CHAT,
        {"messages": message(content=[{"type": "text"}])},
        400,
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    (CHAT, {"messages": message(role="robot")}, 400, "messages[0].role", "unsupported_value"),
    (CHAT, {"messages": message(role="tool")}, 400, "messages[0].tool_call_id", "missing_required_parameter"),
    (CHAT, {"messages": message(role="tool", tool_call_id="")}, 400, "messages[0].tool_call_id", "empty_string"),
    (CHAT, {"messages": message(tool_call_id="1")}, 400, "messages[0].tool_call_id", "conflicting_parameters"),
    (CHAT, {"messages": message(tool_calls=[PAST])}, 400, "messages[0].tool_calls", "conflicting_parameters"),
    (CHAT, {"messages": calls({"id": 5})}, 400, "messages[0].tool_calls[0].id", "invalid_type"),
    (CHAT, {"messages": calls({"type": "x"})}, 400, "messages[0].tool_calls[0].type", "unsupported_value"),
    (CHAT, {"messages": calls({"function": {}})}, 400, f"{FUNCTION}.name", "missing_required_parameter"),
    (
        CHAT,
        {"messages": calls({"function": {"name": "a b", "arguments": ""}})},
        400,
        f"{FUNCTION}.name",
        "invalid_value",
    ),
    *(
        (
            CHAT,
            {"messages": calls({"function": {"name": "f", "arguments": text}})},
            400,
            f"{FUNCTION}.arguments",
            "invalid_value",
        )
        for text in ("5", "{", "[]", '{"a": NaN}', '{"a": "\\ud800"}', '{"a":' * 5000)
    ),
    (CHAT, {"messages": message(role=None)}, 400, "messages[0].role", "missing_required_parameter"),
    (CHAT, {"messages": message(name="bob")}, 400, "messages[0].name", "conflicting_parameters"),
    (CHAT, {"messages": message(tool_calls=[])}, 400, "messages[0].tool_calls", "conflicting_parameters"),
    (CHAT, {"messages": [{"role": "assistant"}]}, 400, "messages[0].content", "missing_required_parameter"),
    (CHAT, {"messages": message(mood="good")}, 400, "messages[0].mood", "unknown_parameter"),
    # fields that OpenAI has and this server does not
    (CHAT, {"functions": []}, 400, "functions", "unsupported_parameter"),
    (CHAT, {"reasoning_effort": "low"}, 400, "reasoning_effort", "unsupported_parameter"),
    (CHAT, {"service_tier": "flex"}, 400, "service_tier", "unsupported_parameter"),
    (CHAT, {"store": True}, 400, "store", "unsupported_parameter"),
    (CHAT, {"modalities": ["text", "audio"]}, 400, "modalities", "unsupported_parameter"),
    (CHAT, {"metadata": {}}, 400, "metadata", "unsupported_parameter"),
    (TEXT, {"echo": True}, 400, "echo", "unsupported_parameter"),
    (TEXT, {"best_of": 2}, 400, "best_of", "unsupported_parameter"),
    (TEXT, {"suffix": "end"}, 400, "suffix", "unsupported_parameter"),
    (TEXT, {"store": 0}, 400, "store", "unknown_parameter"),
    (CHAT, {"unheard_of": 1}, 400, "unheard_of", "unknown_parameter"),
    (CHAT, {"unheard_of": None}, 400, "unheard_of", "unknown_parameter"),
    (CHAT, {"prompt": "hi"}, 400, "prompt", "unknown_parameter"),
    (EMBED, {"temperature": 1}, 400, "temperature", "unknown_parameter"),
    # tools
    (CHAT, {"tools": []}, 400, "tools", "empty_array"),
    (CHAT, {"tools": {}}, 400, "tools", "invalid_type"),
    (CHAT, {"tools": [{"type": "custom"}]}, 400, "tools[0].type", "unsupported_value"),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "tools[0].function", "missing_required_parameter"),
    (CHAT, {"tools": tool(name="")}, 400, "tools[0].function.name", "invalid_value"),
    (CHAT, {"tools": tool(name="x" * 65)}, 400, "tools[0].function.name", "invalid_value"),
    (CHAT, {"tools": tool(parameters=5)}, 400, "tools[0].function.parameters", "invalid_type"),
    (CHAT, {"tools": tool(parameters=nested(65))}, 400, "tools[0].function.parameters", "invalid_value"),
    (CHAT, {"tools": tool(strict="yes")}, 400, "tools[0].function.strict", "invalid_type"),
    (CHAT, {"tools": [*tool(), *tool()]}, 400, "tools[1].function.name", "invalid_value"),
    (CHAT, {"tools": [tool(name=f"f{i}")[0] for i in range(129)]}, 400, "tools", "array_above_max_length"),
    (CHAT, {"tool_choice": "auto"}, 400, "tool_choice", "conflicting_parameters"),
    (CHAT, {"tools": tool(), "tool_choice": "any"}, 400, "tool_choice", "unsupported_value"),
    (CHAT, {"tools": tool(), "tool_choice": 5}, 400, "tool_choice", "invalid_type"),
    (CHAT, {"tools": tool(), "tool_choice": {"type": "allowed_tools"}}, 400, "tool_choice.type", "unsupported_value"),
    (CHAT, {"tools": tool(), "tool_choice": {"type": "function"}}, 400, "tool_choice.function", "invalid_value"),
    (CHAT, {"tools": tool(), "tool_choice": named("g")}, 400, "tool_choice.function.name", "invalid_value"),
    (CHAT, {"tools": tool(), "tool_choice": named(5)}, 400, "tool_choice.function.name", "invalid_type"),
    (CHAT, {"parallel_tool_calls": True}, 400, "parallel_tool_calls", "conflicting_parameters"),
    (
        CHAT,
        {"tools": tool(), "structured_outputs": {"regex": "a"}},
        400,
        "structured_outputs",
        "conflicting_parameters",
    ),
    (TEXT, {"tools": tool()}, 400, "tools", "unknown_parameter"),
    (TOKENS, {"tools": tool()}, 400, "tools", "conflicting_parameters"),
    # what the answer must look like
    (CHAT, {"response_format": "json"}, 400, "response_format", "invalid_type"),
    (CHAT, {"response_format": {"type": "xml"}}, 400, "response_format.type", "unsupported_value"),
    (
        CHAT,
        {"response_format": {"type": "json_schema"}},
        400,
        "response_format.json_schema",
        "missing_required_parameter",
    ),
    (
        CHAT,
        {"response_format": {"type": "text", "json_schema": {"name": "a"}}},
        400,
        "response_format.json_schema",
        "conflicting_parameters",
    ),
    (CHAT, {"response_format": schema(name="a b")}, 400, "response_format.json_schema.name", "invalid_value"),
    (CHAT, {"response_format": schema(schema=True)}, 400, "response_format.json_schema.schema", "invalid_type"),
    (
        CHAT,
        {"response_format": schema(schema=nested(65))},
        400,
        "response_format.json_schema.schema",
        "invalid_value",
    ),
    (
        CHAT,
        {"response_format": schema(definition={})},
        400,
        "response_format.json_schema.definition",
        "unknown_parameter",
    ),
    (CHAT, {"response_format": schema(strict=1)}, 400, "response_format.json_schema.strict", "invalid_type"),
    (CHAT, {"structured_outputs": {}}, 400, "structured_outputs", "missing_required_parameter"),
    (
        CHAT,
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        400,
        "structured_outputs",
        "conflicting_parameters",
    ),
    (CHAT, {"structured_outputs": {"regex": ""}}, 400, "structured_outputs.regex", "empty_string"),
    (CHAT, {"structured_outputs": {"choice": []}}, 400, "structured_outputs.choice", "empty_array"),
    (CHAT, {"structured_outputs": {"choice": [5]}}, 400, "structured_outputs.choice[0]", "invalid_type"),
    (CHAT, {"structured_outputs": {"json": "{"}}, 400, "structured_outputs.json", "invalid_value"),
    (CHAT, {"structured_outputs": {"json": "[" * 100_000}}, 400, "structured_outputs.json", "invalid_value"),
    (CHAT, {"structured_outputs": {"json": 5}}, 400, "structured_outputs.json", "invalid_type"),
    (
        CHAT,
        {"structured_outputs": {"structural_tag": "x"}},
        400,
        "structured_outputs.structural_tag",
        "unsupported_parameter",
    ),
    (
        TEXT,
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        400,
        "structured_outputs",
        "conflicting_parameters",
    ),
    # lengths
    (CHAT, {"max_tokens": 0}, 400, "max_tokens", "below_min_value"),
    (CHAT, {"max_tokens": -5}, 400, "max_tokens", "below_min_value"),
    (CHAT, {"max_tokens": 513}, 400, "max_tokens", "above_max_value"),
    (CHAT, {"max_completion_tokens": 513}, 400, "max_completion_tokens", "above_max_value"),
    (CHAT, {"max_tokens": 10**30}, 400, "max_tokens", "above_max_value"),
    (CHAT, {"max_tokens": 10**300}, 400, "max_tokens", "above_max_value"),
    (CHAT, {"max_tokens": 1.5}, 400, "max_tokens", "invalid_type"),
    (CHAT, {"max_tokens": "5"}, 400, "max_tokens", "invalid_type"),
    (CHAT, {"max_tokens": True}, 400, "max_tokens", "invalid_type"),
    (CHAT, {"max_tokens": 4, "max_completion_tokens": 5}, 400, "max_completion_tokens", "conflicting_parameters"),
    (CHAT, {"max_tokens": 4, "min_tokens": 5}, 400, "min_tokens", "above_max_value"),
    (CHAT, {"min_tokens": -1}, 400, "min_tokens", "below_min_value"),
    # sampling
    (CHAT, {"temperature": 2.1}, 400, "temperature", "above_max_value"),
    (CHAT, {"temperature": -0.1}, 400, "temperature", "below_min_value"),
    (CHAT, {"temperature": "hot"}, 400, "temperature", "invalid_type"),
    (CHAT, {"temperature": False}, 400, "temperature", "invalid_type"),
    (CHAT, {"top_p": 0}, 400, "top_p", "below_min_value"),
    (CHAT, {"top_p": 1.01}, 400, "top_p", "above_max_value"),
    (CHAT, {"top_k": 0}, 400, "top_k", "below_min_value"),
    (CHAT, {"top_k": -1}, 400, "top_k", "below_min_value"),
    (CHAT, {"min_p": 1.5}, 400, "min_p", "above_max_value"),
    (CHAT, {"seed": 2**63}, 400, "seed", "above_max_value"),
    (CHAT, {"seed": -(2**63) - 1}, 400, "seed", "below_min_value"),
    (CHAT, {"seed": 1.0}, 400, "seed", "invalid_type"),
    (CHAT, {"presence_penalty": 2.5}, 400, "presence_penalty", "above_max_value"),
    (CHAT, {"frequency_penalty": -2.5}, 400, "frequency_penalty", "below_min_value"),
    (CHAT, {"repetition_penalty": 0}, 400, "repetition_penalty", "below_min_value"),
    (CHAT, {"logit_bias": {"5": 101}}, 400, "logit_bias.5", "invalid_value"),
    (CHAT, {"logit_bias": {"5": "1"}}, 400, "logit_bias.5", "invalid_type"),
    (CHAT, {"logit_bias": {"five": 1}}, 400, "logit_bias", "invalid_value"),
    (CHAT, {"logit_bias": {"-5": 1}}, 400, "logit_bias", "invalid_value"),
    (CHAT, {"logit_bias": {"\u0665": 1}}, 400, "logit_bias", "invalid_value"),
    (CHAT, {"logit_bias": [5]}, 400, "logit_bias", "invalid_type"),
    (CHAT, {"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias", "array_above_max_length"),
    # choices, stops, logprobs
    (CHAT, {"n": 0}, 400, "n", "below_min_value"),
    (CHAT, {"n": 9}, 400, "n", "above_max_value"),
    (TEXT, {"n": 3, "prompt": ["a", "b", "c"]}, 400, "n", "above_max_value"),
    (TEXT, {"prompt": ["a"] * 9}, 400, "prompt", "above_max_value"),
    (CHAT, {"stop": ""}, 400, "stop[0]", "empty_string"),
    (CHAT, {"stop": ["a", ""]}, 400, "stop[1]", "empty_string"),
    (CHAT, {"stop": 5}, 400, "stop", "invalid_type"),
    (CHAT, {"stop": ["a", 5]}, 400, "stop[1]", "invalid_type"),
    (CHAT, {"stop": "x" * 1025}, 400, "stop[0]", "string_above_max_length"),
    (CHAT, {"stop": [str(i) for i in range(1000)]}, 400, "stop", "array_above_max_length"),
    (CHAT, {"stop_token_ids": [-1]}, 400, "stop_token_ids[0]", "below_min_value"),
    (CHAT, {"stop_token_ids": 5}, 400, "stop_token_ids", "invalid_type"),
    (CHAT, {"stop_token_ids": [1] * 1025}, 400, "stop_token_ids", "array_above_max_length"),
    (CHAT, {"top_logprobs": 2}, 400, "top_logprobs", "conflicting_parameters"),
    (CHAT, {"logprobs": False, "top_logprobs": 2}, 400, "top_logprobs", "conflicting_parameters"),
    (CHAT, {"logprobs": True, "top_logprobs": 6}, 400, "top_logprobs", "above_max_value"),
    (CHAT, {"logprobs": 2}, 400, "logprobs", "invalid_type"),
    (TEXT, {"logprobs": 6}, 400, "logprobs", "above_max_value"),
    (TEXT, {"logprobs": True}, 400, "logprobs", "invalid_type"),
    # streams
    (CHAT, {"stream": "yes"}, 400, "stream", "invalid_type"),
    (CHAT, {"stream_options": {"include_usage": True}}, 400, "stream_options", "conflicting_parameters"),
    (CHAT, {"stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "unknown_parameter"),
    (CHAT, {"stream": True, "stream_options": 1}, 400, "stream_options", "invalid_type"),
    (CHAT, {"user": "u" * 513}, 400, "user", "string_above_max_length"),
    # prompts
    (TEXT, {"prompt": None}, 400, "prompt", "missing_required_parameter"),
    (TEXT, {"prompt": 5}, 400, "prompt", "invalid_type"),
    (TEXT, {"prompt": []}, 400, "prompt", "empty_array"),
    (TEXT, {"prompt": [[]]}, 400, "prompt[0]", "empty_array"),
    (TEXT, {"prompt": ["a", 5]}, 400, "prompt[1]", "invalid_type"),
    (TEXT, {"prompt": [5, "a"]}, 400, "prompt[1]", "invalid_type"),
    (TEXT, {"prompt": [5, -1]}, 400, "prompt[1]", "invalid_type"),
    (TEXT, {"prompt": [5, 2**31]}, 400, "prompt[1]", "invalid_type"),
    (TEXT, {"prompt": [[5], [True]]}, 400, "prompt[1][0]", "invalid_type"),
    (TEXT, {"prompt": [None]}, 400, "prompt[0]", "invalid_type"),
    (TEXT, {"prompt": "x" * 600}, 400, None, "context_length_exceeded"),
    # embeddings, tokens
    (EMBED, {"input": ""}, 400, "input", "empty_string"),
    (EMBED, {"input": ["a", ""]}, 400, "input[1]", "empty_string"),
    (EMBED, {"input": ["a"] * 2049}, 400, "input", "array_above_max_length"),
    (CLASSIFY, {"input": None}, 400, "input", "missing_required_parameter"),
    (CLASSIFY, {"input": ["a", ""]}, 400, "input[1]", "empty_string"),
    (CLASSIFY, {"input": []}, 400, "input", "empty_array"),
    (CLASSIFY, {"input": {"text": "a"}}, 400, "input", "invalid_type"),
    (CLASSIFY, {"encoding_format": "float"}, 400, "encoding_format", "unknown_parameter"),
    (EMBED, {"encoding_format": "int8"}, 400, "encoding_format", "unsupported_value"),
    (EMBED, {"dimensions": 3}, 400, "dimensions", "unsupported_value"),
    (EMBED, {"dimensions": 0}, 400, "dimensions", "below_min_value"),
    (TOKENS, {"prompt": None}, 400, "prompt", "missing_required_parameter"),
    (TOKENS, {"messages": [USER]}, 400, "prompt", "conflicting_parameters"),
    (TOKENS, {"add_generation_prompt": True}, 400, "add_generation_prompt", "conflicting_parameters"),
    (TOKENS, {"chat_template": "x"}, 400, "chat_template", "unsupported_parameter"),
    (IDS, {"tokens": ["a"]}, 400, "tokens[0]", "invalid_type"),
    (IDS, {"tokens": [2**31 - 1]}, 400, "tokens", "invalid_request"),
]

# raw body, status, param, code, words in the message
BODIES: list[tuple[bytes, int, str | None, str, str]] = [
    (b"", 400, None, "invalid_json", "line 1 column 1"),
    (b"{", 400, None, "invalid_json", "line 1 column 2"),
    (b'{"model": "writer",\n "messages": [}', 400, None, "invalid_json", "line 2 column 15"),
    (b"null", 400, None, "invalid_type", "JSON object"),
    (b"[]", 400, None, "invalid_type", "array of 0 items"),
    (b'"hi"', 400, None, "invalid_type", '"hi"'),
    (b'{"model": "\xff"}', 400, None, "invalid_encoding", "byte 11"),
    (b"\xfe\xff\x00{", 400, None, "invalid_encoding", "byte 0"),
    (b'\xef\xbb\xbf{"model": "writer"}', 400, None, "invalid_json", "BOM"),
    (b'{"temperature": NaN}', 400, None, "invalid_json", "NaN"),
    (b'{"temperature": -Infinity}', 400, None, "invalid_json", "-Infinity"),
    (b'{"model": "a", "model": "b"}', 400, "model", "duplicate_key", '"model"'),
    (b'{"model": "writer", "messages": [], "temperature": 1e999}', 400, "temperature", "invalid_value", "finite"),
    (b'{"seed": ' + b"9" * 5000 + b"}", 400, None, "invalid_json", "number that is too long"),
    (b"[" * 100_000, 400, None, "invalid_json", "nested too deeply"),
    (
        b'{"model": "writer", "messages": [{"role": "user", "content": "ab\\ud800"}]}',
        400,
        "messages[0].content",
        "invalid_unicode",
        "\\ud800) at character 2",
    ),
    (b'{"model": "writer", "\\udfff": 1}', 400, None, "invalid_unicode", "\\udfff"),
]


@pytest.mark.parametrize(("endpoint", "changes", "status", "param", "code"), FIELDS)
async def test_a_wrong_field_is_named(
    endpoint: str, changes: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    backend = FakeBackend()
    async with in_process(create_app(backend)) as client:
        answer = await client.post(endpoint, json=BASES[endpoint] | changes)
        assert (await client.post(endpoint, json=BASES[endpoint])).status_code == 200
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    assert backend.num_open == 0


@pytest.mark.parametrize(("body", "status", "param", "code", "words"), BODIES)
async def test_a_wrong_body_is_explained(body: bytes, status: int, param: str | None, code: str, words: str) -> None:
    async with in_process(create_app(FakeBackend())) as client:
        answer = await client.post(CHAT, content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
    assert words in error["message"]


async def test_messages_name_value_and_limit() -> None:
    async with in_process(create_app(FakeBackend())) as client:

        async def said(endpoint: str, **changes: object) -> str:
            answer = await client.post(endpoint, json=BASES[endpoint] | changes)
            return str(answer.json()["error"]["message"])

        assert await said(CHAT, temperature=2.5) == "Invalid 'temperature': expected a value of at most 2, got 2.5."
        assert await said(CHAT, max_tokens=10**30) == (
            f"Invalid 'max_tokens': expected a value of at most 2147483647, got {10**30}."
        )
        assert await said(CHAT, max_tokens=600) == "Invalid 'max_tokens': expected a value of at most 512, got 600."
        assert await said(CHAT, stop=["x"] * 1000) == "Invalid 'stop': expected at most 16 strings, got 1000."
        assert await said(CHAT, model="nope") == (
            "The model 'nope' does not exist. Served models: embedder, sorter, writer."
        )
        assert "/v1/embeddings" in await said(CHAT, model="embedder")
        assert "call /v1/classify with it" in await said(EMBED, model="sorter")
        assert "/v1/chat/completions or /v1/completions" in await said(EMBED, model="writer")
        assert "616 tokens" in await said(TEXT, prompt="x" * 600)
        assert await said(TEXT, n=4, prompt=["a", "b", "c"]) == (
            "Invalid 'n': 4 choices for each of 3 prompts exceed the limit of 8 choices in one request."
        )
        assert await said(EMBED, dimensions=3) == "Invalid 'dimensions': the model has 8, got 3."


async def test_any_content_type_is_read_as_json() -> None:
    async with in_process(create_app(FakeBackend())) as client:
        body = json.dumps(BASES[CHAT]).encode()
        for content_type in ("text/plain", "application/x-www-form-urlencoded", "nonsense"):
            answer = await client.post(CHAT, content=body, headers={"content-type": content_type})
            assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/some/org", 404, "model_not_found"),
        ("POST", "/v1/chat/completions/", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/writer", 405, "method_not_allowed"),
        ("PUT", "/health", 405, "method_not_allowed"),
    ],
)
async def test_unknown_urls_and_methods_have_the_same_shape(method: str, path: str, status: int, code: str) -> None:
    async with in_process(create_app(FakeBackend())) as client:
        answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert ("allow" in answer.headers) == (status == 405)
