"""Anything at all sent to any endpoint: never a 5xx, always an answer that the OpenAPI document describes."""

import asyncio
import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from deployments.gateway.app import create_app
from tests.support.fake_backend import FakeBackend
from tests.support.gateway_client import post

ENDPOINTS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify", "/tokenize", "/detokenize"]
MODELS = {"/v1/embeddings": "embedder", "/v1/classify": "sorter"}
FIELDS = [
    "model",
    "messages",
    "prompt",
    "input",
    "tokens",
    "stop",
    "n",
    "seed",
    "logit_bias",
    "logprobs",
    "stream",
    "stream_options",
    "max_tokens",
    "temperature",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "structured_outputs",
]

app = create_app(FakeBackend())
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
quick = settings(
    max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
thorough = settings(quick, max_examples=50)

numbers = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, 2**64, 10**400, -0.0, 1e-320])
texts = st.text() | st.sampled_from(["writer", "embedder", "sorter", "user", "\ud800", "\x00", "text"])
scalars = st.none() | st.booleans() | numbers | texts
keys = st.sampled_from([*FIELDS, "role", "content", "type", "text", "5"]) | st.text(max_size=4)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
)
schemas = st.dictionaries(st.sampled_from(["type", "properties", "$ref", "enum"]), anything, max_size=3)
functions = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g"])}, optional={"parameters": schemas, "strict": st.booleans()}
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": texts | st.none()},
    optional={
        "tool_call_id": texts,
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {
                    "id": texts,
                    "type": st.just("function"),
                    "function": st.fixed_dictionaries(
                        {"name": st.just("f"), "arguments": st.sampled_from(["", "{}", '{"a": 1e999}', "["]) | texts}
                    ),
                }
            ),
            max_size=2,
        ),
    },
)
likely = {
    "messages": st.lists(turns, min_size=1, max_size=3),
    "tools": st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": functions}), max_size=2),
    "tool_choice": st.sampled_from(["auto", "required", {"type": "function", "function": {"name": "f"}}]),
    "response_format": st.fixed_dictionaries(
        {
            "type": st.just("json_schema"),
            "json_schema": st.fixed_dictionaries({"name": st.just("s"), "schema": schemas}),
        }
    ),
    "structured_outputs": st.fixed_dictionaries(
        {}, optional={"json": schemas, "regex": texts, "choice": st.lists(texts), "grammar": texts}
    ),
}
requests = st.fixed_dictionaries(
    {"model": st.sampled_from(["writer", "embedder", "sorter"])},
    optional={name: likely.get(name, st.nothing()) | anything for name in FIELDS if name != "model"},
)


@pytest.fixture(scope="module")
def schema() -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", path) for path in ENDPOINTS),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{model}"),
        ("GET", "/health"),
    ],
)
def test_requests_made_from_the_document(schema: Any, method: str, path: str) -> None:
    @quick
    @given(case=schema[path][method].as_strategy())
    def holds(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body["model"] = MODELS.get(path, "writer")
        case.call_and_validate(checks=CHECKS)

    holds()


@thorough
@given(path=st.sampled_from(ENDPOINTS), body=st.binary(max_size=200))
def test_random_bytes(path: str, body: bytes) -> None:
    refuses_or_answers(path, body)


@thorough
@given(path=st.sampled_from(ENDPOINTS), body=requests)
def test_random_json(path: str, body: object) -> None:
    refuses_or_answers(path, json.dumps(body).encode())


def refuses_or_answers(path: str, body: bytes) -> None:
    status, answer = asyncio.run(post(app, path, body))
    assert status in (200, 400, 404, 413)
    if status != 200:
        [error] = json.loads(answer).values()
        assert set(error) == {"message", "type", "param", "code"}
