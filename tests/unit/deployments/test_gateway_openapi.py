"""The OpenAPI document describes what is really taken and given."""

from typing import Any

import jsonschema
import pytest

from deployments.gateway.app import create_app
from tests.support.fake_backend import FakeBackend
from tests.support.gateway_client import in_process

CHAT = {"model": "writer", "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"model": "writer", "prompt": ["a", "b"], "n": 2, "logprobs": 1, "stop": ["x"]}),
    ("/v1/embeddings", {"model": "embedder", "input": [[1, 2], [3]], "encoding_format": "base64"}),
    ("/v1/classify", {"model": "sorter", "input": ["a", "bc"], "user": "me"}),
    ("/tokenize", {"model": "writer", "prompt": "a", "return_token_strs": True}),
    ("/detokenize", {"model": "writer", "tokens": [97]}),
]


@pytest.mark.parametrize(("path", "body"), GOOD)
async def test_bodies_match_their_schemas(path: str, body: dict[str, Any]) -> None:
    async with in_process(create_app(FakeBackend())) as client:
        document = (await client.get("/openapi.json")).json()
        answer = await client.post(path, json=body)
        refused = await client.post(path, json=body | {"nonsense": 1})
    operation = document["paths"][path]["post"]
    assert operation["requestBody"]["required"]
    check(document, operation["requestBody"], body)
    check(document, operation["responses"]["200"], answer.json())
    check(document, operation["responses"]["4XX"], refused.json())
    with pytest.raises(jsonschema.ValidationError, match="nonsense"):
        check(document, operation["requestBody"], body | {"nonsense": 1})


def check(document: dict[str, Any], described: dict[str, Any], value: object) -> None:
    schema = described["content"]["application/json"]["schema"]
    jsonschema.validate(value, schema | {"components": document["components"]})


async def test_every_field_is_explained() -> None:
    async with in_process(create_app(FakeBackend())) as client:
        schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
        page = await client.get("/docs")
    for name in ("ChatCompletionRequest", "CompletionRequest", "EmbeddingRequest", "ClassificationRequest"):
        assert schemas[name]["additionalProperties"] is False
        assert all("description" in field for field in schemas[name]["properties"].values())
    assert page.status_code == 200
