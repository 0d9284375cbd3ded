"""What the OpenAPI document says about every route: request models and response structs in, JSON schemas out."""

from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from deployments.gateway import answers, openai
from deployments.gateway.fields import Body

_REF = "#/components/schemas/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Documented:
    """One route's body and answer; ``chunk`` is what an event of its stream holds."""

    tag: str
    answer: type[msgspec.Struct]
    request: type[Body] | None = None
    chunk: type[msgspec.Struct] | None = None

    def route_options(self) -> dict[str, Any]:
        """Keyword arguments of ``add_api_route``."""
        options: dict[str, Any] = {"tags": [self.tag], "response_model": None, "responses": self._responses()}
        if self.request is not None:
            body = {"required": True, "content": _json_of(self.request)}
            options["openapi_extra"] = {"requestBody": body}
        return options

    def _responses(self) -> dict[int | str, dict[str, Any]]:
        content = _json_of(self.answer)
        if self.chunk is not None:
            events = f"One `data:` line with a {self.chunk.__name__} for every event, then `data: [DONE]`."
            content["text/event-stream"] = {"schema": {"type": "string", "description": events}}
        error = _json_of(answers.ErrorResponse)
        return {
            200: {"description": "Done", "content": content},
            "4XX": {"description": "The request is wrong, or comes at the wrong time", "content": error},
            "5XX": {"description": "The server failed", "content": error},
        }


CHAT = Documented(
    tag="Generation",
    request=openai.ChatCompletionRequest,
    answer=answers.ChatCompletion,
    chunk=answers.ChatCompletionChunk,
)
COMPLETIONS = Documented(
    tag="Generation", request=openai.CompletionRequest, answer=answers.Completion, chunk=answers.CompletionChunk
)
EMBEDDINGS = Documented(tag="Embeddings", request=openai.EmbeddingRequest, answer=answers.EmbeddingList)
CLASSIFY = Documented(tag="Classification", request=openai.ClassificationRequest, answer=answers.ClassificationList)
MODELS = Documented(tag="Models", answer=answers.ModelList)
MODEL = Documented(tag="Models", answer=answers.ModelCard)
TOKENIZE = Documented(tag="Tokens", request=openai.TokenizeRequest, answer=answers.TokenizeResponse)
DETOKENIZE = Documented(tag="Tokens", request=openai.DetokenizeRequest, answer=answers.DetokenizeResponse)
HEALTH = Documented(tag="Health", answer=answers.HealthResponse)

_ALL = (CHAT, COMPLETIONS, EMBEDDINGS, CLASSIFY, MODELS, MODEL, TOKENIZE, DETOKENIZE, HEALTH)


def document(app: FastAPI) -> dict[str, Any]:
    """The whole OpenAPI document, with the schemas of all bodies."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schema.setdefault("components", {}).setdefault("schemas", {}).update(_schemas())
        app.openapi_schema = schema
    return app.openapi_schema


def _schemas() -> dict[str, Any]:
    requests = [(one.request, "validation") for one in _ALL if one.request is not None]
    _, generated = models_json_schema(requests, ref_template=_REF + "{model}")  # type: ignore[arg-type]
    structs = {struct for one in _ALL for struct in (one.answer, one.chunk) if struct is not None}
    structs.add(answers.ErrorResponse)
    _, components = msgspec.json.schema_components(structs, ref_template=_REF + "{name}")
    return {**generated["$defs"], **components}


def _json_of(kind: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF + kind.__name__}}}
