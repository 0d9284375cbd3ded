"""Checked requests in, messages for the backend out; what this model or these settings forbid is refused here."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from cluster.plan.types import GatewaySettings, Route, Task
from deployments.gateway.backend import Backend
from deployments.gateway.body import printable
from deployments.gateway.call import Call
from deployments.gateway.conversation import ChatMessage
from deployments.gateway.errors import ApiError
from deployments.gateway.openai import (
    ChatCompletionRequest,
    ClassificationRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationRequest,
    TokenizeRequest,
)
from deployments.gateway.tools import Tool
from deployments.messages import (
    ChatPrompt,
    Classify,
    Embed,
    Generate,
    Prompt,
    SamplingParams,
    TextPrompt,
    Tokenize,
    TokenPrompt,
    ToolUse,
)

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
_MAX_LISTED_MODELS = 20

_ENDPOINTS: dict[Task, str] = {
    "generate": "/v1/chat/completions or /v1/completions",
    "embed": "/v1/embeddings",
    "classify": "/v1/classify",
}
_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one HTTP request asks of the backend: one ``Generate`` a prompt, ``n`` choices each."""

    route: Route
    requests: tuple[Generate, ...]
    n: int
    wants_logprobs: bool
    tool_names: frozenset[str] | None = None
    """Tools that may be called; None where none may be."""

    @property
    def num_choices(self) -> int:
        """Choices of all prompts together."""
        return self.n * len(self.requests)


def find_route(backend: Backend, model: str, task: Task | None) -> Route:
    """The route of ``model``; ApiError where nobody serves it, or it does another task (None: any will do)."""
    route = backend.find(model)
    if route is None:
        served = sorted(route.model for route in backend.table.routes)
        shown = ", ".join(served[:_MAX_LISTED_MODELS]) or "none"
        more = f" and {len(served) - _MAX_LISTED_MODELS} more" if len(served) > _MAX_LISTED_MODELS else ""
        message = f"The model '{printable(model)}' does not exist. Served models: {shown}{more}."
        raise ApiError("model_not_found", message, param="model")
    if task is not None and route.task != task:
        message = f"The model '{model}' does not serve this endpoint; call {_ENDPOINTS[route.task]} with it."
        raise ApiError("wrong_endpoint", message, param="model")
    return route


def chat_generation(request: ChatCompletionRequest, route: Route, call: Call) -> Generation:
    """A chat completion as one Generate."""
    max_tokens = request.max_completion_tokens or request.max_tokens
    limit_name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    _check_at_most("top_logprobs", num_logprobs or 0, call.settings.max_logprobs)
    sampling = _sampling(request, max_tokens, limit_name, num_logprobs, route, call.settings)
    tools = request.tools if request.may_call else None
    generation = _generation([_chat_prompt(request.messages, tools)], sampling, max_tokens, route, call)
    if tools is None:
        return generation
    requests = tuple(replace(one, tools=_tool_use(request, tools)) for one in generation.requests)
    names = frozenset(tool.function.name for tool in tools)
    return dataclasses.replace(generation, requests=requests, tool_names=names)


def completion_generation(request: CompletionRequest, route: Route, call: Call) -> Generation:
    """A text completion as one Generate for every prompt."""
    max_tokens = request.max_tokens if request.max_tokens is not None else COMPLETION_MAX_TOKENS
    max_tokens = max_tokens if request.max_tokens is not None else min(max_tokens, route.context_tokens)
    _check_at_most("logprobs", request.logprobs or 0, call.settings.max_logprobs)
    sampling = _sampling(request, max_tokens, "max_tokens", request.logprobs, route, call.settings)
    return _generation([_text_prompt(prompt) for prompt in request.prompt], sampling, max_tokens, route, call)


def embed_message(request: EmbeddingRequest, call: Call) -> Embed:
    """All inputs of an embedding request."""
    return Embed(request_id=call.backend_id(), inputs=request.input, deadline_s=call.remaining_s)


def classify_message(request: ClassificationRequest, call: Call) -> Classify:
    """All inputs of a classification request."""
    return Classify(request_id=call.backend_id(), inputs=request.input, deadline_s=call.remaining_s)


def tokenize_message(request: TokenizeRequest, route: Route, call: Call) -> Tokenize:
    """Text or conversation of a tokenize request."""
    prompt: Prompt
    if request.messages is not None:
        prompt = _chat_prompt(request.messages, request.tools, request.add_generation_prompt is not False)
    else:
        prompt = TextPrompt(text=request.prompt or "", add_special_tokens=request.add_special_tokens is not False)
    return Tokenize(request_id=call.backend_id(), prompt=prompt, adapter=route.adapter)


def _generation(
    prompts: Sequence[Prompt], sampling: SamplingParams, max_tokens: int | None, route: Route, call: Call
) -> Generation:
    num_choices, limit = sampling.n * len(prompts), call.settings.max_choices
    if num_choices > limit:
        several = f" for each of {len(prompts)} prompts" if len(prompts) > 1 else ""
        message = f"Invalid 'n': {sampling.n} choices{several} exceed the limit of {limit} choices in one request."
        raise ApiError("above_max_value", message, param="n" if sampling.n > 1 else "prompt")
    requests = [
        Generate(
            request_id=call.backend_id(index),
            prompt=prompt,
            sampling=sampling,
            max_tokens=max_tokens,
            deadline_s=call.remaining_s,
            adapter=route.adapter,
        )
        for index, prompt in enumerate(prompts)
    ]
    wants_logprobs = sampling.logprobs is not None
    return Generation(route=route, requests=tuple(requests), n=sampling.n, wants_logprobs=wants_logprobs)


def _sampling(
    request: GenerationRequest,
    max_tokens: int | None,
    limit_name: str,
    num_logprobs: int | None,
    route: Route,
    settings: GatewaySettings,
) -> SamplingParams:
    if max_tokens is not None:
        _check_at_most(limit_name, max_tokens, route.context_tokens)
    bound = route.context_tokens if max_tokens is None else max_tokens
    _check_at_most("min_tokens", request.min_tokens or 0, bound)
    stop = tuple(request.stop or ())
    if len(stop) > settings.max_stop_strings:
        limit = settings.max_stop_strings
        message = f"Invalid 'stop': expected at most {limit} strings, got {len(stop)}."
        raise ApiError("array_above_max_length", message, param="stop")
    given = {name: getattr(request, name) for name in _SAME_NAME}
    known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(
        max_tokens=bound,
        stop=stop,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        logprobs=num_logprobs,
        grammar=request.grammar,
        **known,
    )


def _check_at_most(param: str, value: int, limit: int) -> None:
    if value > limit:
        message = f"Invalid '{param}': expected a value of at most {limit}, got {value}."
        raise ApiError("above_max_value", message, param=param)


def _chat_prompt(
    messages: Sequence[ChatMessage], tools: Sequence[Tool] | None, add_generation_prompt: bool = True
) -> ChatPrompt:
    return ChatPrompt(
        messages=tuple(_turn(message) for message in messages),
        add_generation_prompt=add_generation_prompt,
        tools=tuple(tool.for_template() for tool in tools or ()),
    )


def _turn(message: ChatMessage) -> dict[str, Any]:
    turn: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.tool_calls:
        turn["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    given = {"tool_call_id": message.tool_call_id, "name": message.name}
    return turn | {name: value for name, value in given.items() if value is not None}


def _tool_use(request: ChatCompletionRequest, tools: Sequence[Tool]) -> ToolUse:
    return ToolUse(
        required=request.choice.mode in ("required", "named"),
        name=request.choice.name,
        parallel=request.parallel_tool_calls is not False and request.choice.mode != "named",
        strict=tuple(tool.function.name for tool in tools if tool.function.strict),
    )


def _text_prompt(prompt: str | tuple[int, ...]) -> Prompt:
    return TextPrompt(text=prompt) if isinstance(prompt, str) else TokenPrompt(token_ids=prompt)
