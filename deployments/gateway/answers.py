"""Responses as OpenAI's clients read them: what was generated enters, structs that encode to OpenAI's JSON leave."""

import codecs
from collections.abc import Sequence
from math import isfinite
from typing import Literal

import msgspec

from deployments.messages import ChosenLogprob, FinishReason, TokenLogprob

_utf8_replacing = codecs.getincrementaldecoder("utf-8")
_LOWEST_LOGPROB = -9999.0  # what OpenAI writes for "all but impossible"; JSON has no infinity


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A generated token and its alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities of a chat choice, one entry per token."""

    content: list[TokenLogprobEntry]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities of a completion choice; four lists with one entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


AnswerFinishReason = FinishReason | Literal["tool_calls"]


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """What is called; ``arguments`` are JSON as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a tool."""

    id: str
    type: Literal["function"]
    function: Function


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The model's turn; ``content`` is null when it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: AnswerFinishReason


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``POST /v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: Usage


class FunctionDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """More of a call; ``name`` comes with the first piece."""

    arguments: str
    name: str | None = None


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """More of the ``index``-th call; ``id`` and ``type`` come with the first piece."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: Literal["function"] | None = None


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """More of the model's turn; ``role`` comes with the first piece, ``tool_calls`` where there is more of one."""

    content: str | None
    role: Literal["assistant"] | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """More of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: AnswerFinishReason | None


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """More of one continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionChunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of a streamed completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """One vector; a string is base64 of little-endian float32 numbers."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class InputUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a request that generates none."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``POST /v1/embeddings``, in input order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: InputUsage


class Classification(msgspec.Struct, frozen=True, kw_only=True):
    """What one input is: its most likely label, and the probability of each, in the order of ``labels``."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassificationList(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``POST /v1/classify``, in input order; ``labels`` are all that the model knows."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    labels: list[str]
    data: list[Classification]
    usage: InputUsage


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One served model; ``parent`` is the model that it is an adapter of."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``GET /v1/models``."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``POST /tokenize``; ``token_strs`` only where asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``POST /detokenize``."""

    prompt: str


class HealthModel(msgspec.Struct, frozen=True, kw_only=True):
    """One served model, how many replicas it has, and how busy they are."""

    model: str
    task: Literal["generate", "embed", "classify"]
    num_replicas: int
    num_running: int
    num_waiting: int
    kv_used_fraction: float


class HealthResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``GET /health`` when requests can be answered."""

    status: Literal["ok"]
    num_requests: int
    """In flight in the gateway process that answers."""
    models: list[HealthModel]


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong; ``param`` is the field at fault, where there is one."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Body of every response that is not a success."""

    error: ErrorDetail


def usage(num_prompt_tokens: int, num_cached_tokens: int, num_completion_tokens: int) -> Usage:
    """Usage in OpenAI's words."""
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_completion_tokens,
        total_tokens=num_prompt_tokens + num_completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached_tokens),
    )


def chat_logprobs(entries: Sequence[ChosenLogprob]) -> ChatLogprobs:
    """Log-probabilities as chat completions write them."""
    return ChatLogprobs(content=[_chat_entry(entry) for entry in entries])


def _chat_entry(entry: ChosenLogprob) -> TokenLogprobEntry:
    chosen = entry.chosen
    return TokenLogprobEntry(
        token=chosen.text,
        logprob=_finite(chosen.logprob),
        bytes=list(chosen.raw),
        top_logprobs=[
            TopLogprob(token=other.text, logprob=_finite(other.logprob), bytes=list(other.raw)) for other in entry.top
        ],
    )


class TextOffsets:
    """Where in a text its tokens begin, in characters; tokens that share a character begin where it does."""

    def __init__(self) -> None:
        self._decoder = _utf8_replacing(errors="replace")
        self._num_characters = 0

    def place(self, raw: bytes) -> int:
        """Where the next token begins, which stands for the bytes ``raw``."""
        offset = self._num_characters
        self._num_characters += len(self._decoder.decode(raw))
        return offset


def completion_logprobs(entries: Sequence[ChosenLogprob], offsets: TextOffsets) -> CompletionLogprobs:
    """Log-probabilities as text completions write them; ``offsets`` has seen the tokens before.

    The chosen token is always among its alternatives, as at OpenAI; a token that is not whole characters is written
    as ``bytes:`` and its bytes in hexadecimal escapes, so that two of them stay two keys.
    """
    return CompletionLogprobs(
        tokens=[_token_name(entry.chosen) for entry in entries],
        token_logprobs=[_finite(entry.chosen.logprob) for entry in entries],
        top_logprobs=[
            {_token_name(token): _finite(token.logprob) for token in (*entry.top, entry.chosen)} for entry in entries
        ],
        text_offset=[offsets.place(entry.chosen.raw) for entry in entries],
    )


def _token_name(token: TokenLogprob) -> str:
    try:
        return token.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)


def _finite(logprob: float) -> float:
    return logprob if isfinite(logprob) else _LOWEST_LOGPROB
