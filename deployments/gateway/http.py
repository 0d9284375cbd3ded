"""The routes: an HTTP request in, a response out; each reads its body, asks the backend, writes OpenAI's answer."""

import base64
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TypeVar

import msgspec
import numpy as np
from fastapi import FastAPI, Request
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from cluster.plan.types import Route, Task
from deployments.gateway.admission import Permits
from deployments.gateway.answers import (
    Classification,
    ClassificationList,
    DetokenizeResponse,
    Embedding,
    EmbeddingList,
    HealthModel,
    HealthResponse,
    InputUsage,
    ModelCard,
    ModelList,
    TokenizeResponse,
)
from deployments.gateway.backend import Backend
from deployments.gateway.body import parse_json, read_limited
from deployments.gateway.call import Call
from deployments.gateway.chunks import ChunkEncoder
from deployments.gateway.closing import Closing
from deployments.gateway.collect import Collector, Dialect, Identity
from deployments.gateway.errors import ApiError, ClientGone
from deployments.gateway.invalid import validate
from deployments.gateway.merge import MergedStreams
from deployments.gateway.openai import (
    ChatCompletionRequest,
    ClassificationRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    GenerationRequest,
    ModelRequest,
    TokenizeRequest,
)
from deployments.gateway.openapi import (
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    DETOKENIZE,
    EMBEDDINGS,
    HEALTH,
    MODEL,
    MODELS,
    TOKENIZE,
    Documented,
)
from deployments.gateway.sse import EventEncoder, StreamingAnswer, while_connected
from deployments.gateway.tool_calls import CallingChoices
from deployments.gateway.tool_chunks import CallingChunkEncoder
from deployments.gateway.translate import (
    Generation,
    chat_generation,
    classify_message,
    completion_generation,
    embed_message,
    find_route,
    tokenize_message,
)
from deployments.messages import Classified, Detokenize, Embedded

Endpoint = Callable[[Request], Awaitable[Response]]

AnyRequest = TypeVar("AnyRequest", bound=ModelRequest)


class Endpoints:
    """One method a route; stateless but for the backend."""

    def __init__(self, backend: Backend, heartbeat_s: float, permits: Permits, closing: Closing) -> None:
        self._backend = backend
        self._closing = closing
        self._permits = permits
        self._heartbeat_s = heartbeat_s

    @property
    def by_model(self) -> dict[str, Endpoint]:
        """The endpoints that ask a model, by path; all are POSTs."""
        return {
            "/v1/chat/completions": self.chat_completions,
            "/v1/completions": self.completions,
            "/v1/embeddings": self.embeddings,
            "/v1/classify": self.classify,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }

    def add_to(self, app: FastAPI) -> None:
        """Register every route."""
        self._add(app, "POST", "/v1/chat/completions", self.chat_completions, CHAT)
        self._add(app, "POST", "/v1/completions", self.completions, COMPLETIONS)
        self._add(app, "POST", "/v1/embeddings", self.embeddings, EMBEDDINGS)
        self._add(app, "POST", "/v1/classify", self.classify, CLASSIFY)
        self._add(app, "GET", "/v1/models", self.models, MODELS)
        self._add(app, "GET", "/v1/models/{model:path}", self.model, MODEL)
        self._add(app, "POST", "/tokenize", self.tokenize, TOKENIZE)
        self._add(app, "POST", "/detokenize", self.detokenize, DETOKENIZE)
        self._add(app, "GET", "/health", self.health, HEALTH)

    @staticmethod
    def _add(app: FastAPI, method: str, path: str, endpoint: object, documented: Documented) -> None:
        app.add_api_route(path, endpoint, methods=[method], **documented.route_options())  # type: ignore[arg-type]

    async def chat_completions(self, request: Request) -> Response:
        """Continue a conversation with the model's own chat template; streamed where ``stream`` is true."""
        call, body, route = await self._open(request, ChatCompletionRequest, "generate")
        return await self._generate(request, call, body, chat_generation(body, route, call), "chat")

    async def completions(self, request: Request) -> Response:
        """Continue one or several prompts as they are; streamed where ``stream`` is true."""
        call, body, route = await self._open(request, CompletionRequest, "generate")
        return await self._generate(request, call, body, completion_generation(body, route, call), "completion")

    async def embeddings(self, request: Request) -> Response:
        """One vector for every input."""
        call, body, route = await self._open(request, EmbeddingRequest, "embed")
        message = embed_message(body, call)
        async with call.limit():
            work = self._backend.embed(route.model, message)
            embedded, vectors = await while_connected(work, request.receive)
        call.num_prompt_tokens = embedded.num_prompt_tokens
        if body.dimensions not in (None, embedded.dimensions):
            text = f"Invalid 'dimensions': the model has {embedded.dimensions}, got {body.dimensions}."
            raise ApiError("unsupported_value", text, param="dimensions")
        return _json(_embedding_list(route.model, embedded, vectors, body.encoding_format == "base64"))

    async def classify(self, request: Request) -> Response:
        """The most likely label of every input, with the probabilities of all."""
        call, body, route = await self._open(request, ClassificationRequest, "classify")
        message = classify_message(body, call)
        async with call.limit():
            work = self._backend.classify(route.model, message)
            classified, probabilities = await while_connected(work, request.receive)
        call.num_prompt_tokens = classified.num_prompt_tokens
        return _json(_classification_list(call, route.model, classified, probabilities))

    async def models(self) -> Response:
        """The served models."""
        return _json(ModelList(object="list", data=[_card(route) for route in self._backend.table.routes]))

    async def model(self, model: str) -> Response:
        """One served model."""
        return _json(_card(find_route(self._backend, model, None)))

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text, or of a conversation as the model would see it."""
        call, body, route = await self._open(request, TokenizeRequest, None)
        async with call.limit():
            work = self._backend.tokenize(route.model, tokenize_message(body, route, call))
            tokenized = await while_connected(work, request.receive)
        answer = TokenizeResponse(
            count=len(tokenized.token_ids),
            max_model_len=tokenized.context_tokens,
            tokens=list(tokenized.token_ids),
            token_strs=list(tokenized.token_texts) if body.return_token_strs else None,
        )
        return _json(answer)

    async def detokenize(self, request: Request) -> Response:
        """Text of token ids."""
        call, body, route = await self._open(request, DetokenizeRequest, None)
        message = Detokenize(request_id=call.backend_id(), token_ids=tuple(body.tokens), adapter=route.adapter)
        async with call.limit():
            detokenized = await while_connected(self._backend.detokenize(route.model, message), request.receive)
        return _json(DetokenizeResponse(prompt=detokenized.text))

    async def health(self) -> Response:
        """Whether requests can be answered now; 503 and the reason where they cannot."""
        health = self._backend.health()
        status = "draining" if self._closing.is_closing else health.status
        if status != "ok":
            raise ApiError("unavailable", f"The server is {status}.", retry_after_s=1.0)
        models = [HealthModel(**asdict(model)) for model in health.models]
        return _json(HealthResponse(status="ok", num_requests=self._permits.num_held, models=models))

    async def _open(
        self, request: Request, kind: type[AnyRequest], task: Task | None
    ) -> tuple[Call, AnyRequest, Route]:
        """The checked body, and the route of the model it names."""
        call: Call = request.state.call
        try:
            async with call.limit():
                raw = await read_limited(request.headers, request.stream(), call.settings.max_body_bytes)
        except ClientDisconnect as error:
            raise ClientGone from error
        body = validate(kind, parse_json(raw))
        route = find_route(self._backend, body.model, task)
        call.model = route.model
        call.user = getattr(body, "user", None)
        return call, body, route

    async def _generate(
        self, request: Request, call: Call, body: GenerationRequest, generation: Generation, dialect: Dialect
    ) -> Response:
        identity = _identity(call, generation.route, dialect)
        streams = MergedStreams(self._backend, generation.requests, call, self._heartbeat_s)
        names = generation.tool_names
        calling = None if names is None else CallingChoices(lambda: call.tool_format, names)
        if not body.stream:
            work = _whole(streams, generation, call, identity, dialect, calling)
            return await while_connected(work, request.receive)
        encoder = _encoder(generation, identity, dialect, calling, usage=body.include_usage)
        return StreamingAnswer(streams, encoder, call, include_usage=body.include_usage)


def _encoder(
    generation: Generation, identity: Identity, dialect: Dialect, calling: CallingChoices | None, *, usage: bool
) -> EventEncoder:
    wants_logprobs = generation.wants_logprobs
    if calling is not None:
        return CallingChunkEncoder(identity, calling, wants_logprobs=wants_logprobs, usage=usage)
    num_choices, n = generation.num_choices, generation.n
    return ChunkEncoder(dialect, identity, num_choices, n, wants_logprobs=wants_logprobs, usage=usage)


async def _whole(
    streams: MergedStreams,
    generation: Generation,
    call: Call,
    identity: Identity,
    dialect: Dialect,
    calling: CallingChoices | None,
) -> Response:
    """Everything the streams bring, as one answer."""
    collector = Collector(generation.num_choices, generation.n, generation.wants_logprobs)
    async with call.limit(), streams:
        async for batch in streams:
            collector.add(batch)
    if dialect == "chat":
        return _json(collector.chat(identity, streams.usage, calling))
    return _json(collector.completion(identity, streams.usage))


def _identity(call: Call, route: Route, dialect: Dialect) -> Identity:
    prefix = "chatcmpl" if dialect == "chat" else "cmpl"
    fingerprint = route.targets[0].app if len(route.targets) == 1 else None
    return Identity(
        id=f"{prefix}-{call.unique_id}",
        created=int(time.time()),
        model=route.model,
        system_fingerprint=fingerprint,
    )


def _card(route: Route) -> ModelCard:
    return ModelCard(id=route.model, object="model", created=route.created, owned_by="manta", parent=route.parent)


def _embedding_list(model: str, embedded: Embedded, vectors: NDArray[np.float32], as_base64: bool) -> EmbeddingList:
    def write(vector: NDArray[np.float32]) -> list[float] | str:
        if as_base64:
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers

    data = [
        Embedding(object="embedding", index=index, embedding=write(vector)) for index, vector in enumerate(vectors)
    ]
    num_tokens = embedded.num_prompt_tokens
    return EmbeddingList(
        object="list", data=data, model=model, usage=InputUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    )


def _classification_list(
    call: Call, model: str, classified: Classified, probabilities: NDArray[np.float32]
) -> ClassificationList:
    labels, num_tokens = list(classified.labels), classified.num_prompt_tokens
    data = [
        Classification(index=index, label=labels[int(row.argmax())], probs=row.tolist(), num_classes=len(labels))
        for index, row in enumerate(probabilities)
    ]
    return ClassificationList(
        id=f"classify-{call.unique_id}",
        object="list",
        created=int(time.time()),
        model=model,
        labels=labels,
        data=data,
        usage=InputUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
