"""Requests as OpenAI's clients write them; each enters as JSON values and leaves checked, or as a field's error."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.gateway.conversation import Messages
from deployments.gateway.fields import (
    MAX_STOP_TOKEN_IDS,
    Body,
    Inputs,
    LogitBias,
    StopStrings,
    TokenId,
)
from deployments.gateway.structured import ResponseFormat, StructuredOutputs
from deployments.gateway.tools import AnyToolChoice, ToolChoice, Tools, check_tools
from deployments.messages import Grammar

_ANY: tuple[Any, ...] = ()
_FALSE: tuple[Any, ...] = (False,)

_GENERATION_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"service_tier": ("auto", "default")}
_CHAT_UNSUPPORTED: dict[str, tuple[Any, ...]] = _GENERATION_UNSUPPORTED | {
    "audio": _ANY,
    "function_call": ("none",),
    "functions": _ANY,
    "metadata": _ANY,
    "modalities": (["text"],),
    "moderation": _ANY,
    "prediction": _ANY,
    "prompt_cache_key": _ANY,
    "prompt_cache_options": _ANY,
    "prompt_cache_retention": _ANY,
    "reasoning_effort": _ANY,
    "safety_identifier": _ANY,
    "store": _FALSE,
    "verbosity": _ANY,
    "web_search_options": _ANY,
}


class StreamOptions(Body):
    """What a stream carries beside the text."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"include_obfuscation": _FALSE}

    include_usage: bool | None = None
    """Send one more chunk before ``[DONE]``, with empty ``choices`` and the ``usage`` of the whole request."""


class ModelRequest(Body):
    """What every request to a model has."""

    model: str
    """Name of a served model; ``GET /v1/models`` lists them."""


class GenerationRequest(ModelRequest):
    """What chat and text completions have in common."""

    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Largest number of tokens to generate for each choice; at most the model's context."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the most likely token every time; default 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the most likely tokens that together have this probability; default 1."""
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Sample from this many most likely tokens; absent: from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Leave out tokens less likely than this fraction of the most likely one; default 0."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """The same request with the same seed gives the same tokens; absent: a new one for every request."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from the logits of tokens already generated; default 0."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from the logits of tokens once for every time they were generated; default 0."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Divides the logits of tokens in prompt and answer (multiplies negative ones); default 1."""
    logit_bias: LogitBias | None = None
    """Added to the logits of single tokens; keys are token ids."""
    n: Annotated[int, Field(ge=1)] | None = None
    """Number of choices; default 1."""
    stop: StopStrings | None = None
    """Up to so many strings as the server allows; generation ends before the first that appears."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    """Token ids that end generation, beside the model's own."""
    include_stop_str_in_output: bool | None = None
    """Leave the stop string in the text; default false."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text; default true."""
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """No end of text before this many tokens; default 0."""
    ignore_eos: bool | None = None
    """Go on to ``max_tokens`` whatever the model says; default false."""
    response_format: ResponseFormat | None = None
    """JSON instead of free text; the answer fits it, unless ``max_tokens`` or ``stop`` cut it off."""
    structured_outputs: StructuredOutputs | None = None
    """A JSON schema, regular expression, list of texts or grammar that the answer fits; vLLM's name for it."""
    stream: bool | None = None
    """Send the answer in pieces, as server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with ``stream``."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """Who asks, for the operator's logs."""

    @model_validator(mode="after")
    def _options_need_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            context = {"at": "stream_options"}
            raise PydanticCustomError("conflicting_parameters", "only allowed when 'stream' is true", context)
        return self

    @model_validator(mode="after")
    def _one_format(self) -> "GenerationRequest":
        has_format = self.response_format is not None and self.response_format.type != "text"
        if self.structured_outputs is not None and has_format:
            text = "cannot be combined with 'response_format'"
            raise PydanticCustomError("conflicting_parameters", text, {"at": "structured_outputs"})
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must look like; None for free text."""
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint()
        return self.response_format.grammar() if self.response_format is not None else None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatCompletionRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = _CHAT_UNSUPPORTED

    messages: Messages
    """The conversation so far, rendered by the model's own chat template."""
    tools: Tools | None = None
    """Functions that the model may call, if its chat template knows tools."""
    tool_choice: AnyToolChoice | None = None
    """``none``, ``auto`` (the default), ``required``, or the one function to call; the last two are enforced."""
    parallel_tool_calls: bool | None = None
    """False: at most one call in an answer; default true."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """OpenAI's newer name of ``max_tokens``; absent: as many as the context holds."""
    logprobs: bool | None = None
    """Return the log-probability of every generated token."""
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    """Return so many alternatives too; needs ``logprobs``."""

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatCompletionRequest":
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            context = {"at": "max_completion_tokens", "other": self.max_tokens}
            text = "differs from 'max_tokens' ({other}), which means the same; give one of them"
            raise PydanticCustomError("conflicting_parameters", text, context)
        if self.top_logprobs is not None and not self.logprobs:
            context = {"at": "top_logprobs"}
            raise PydanticCustomError("conflicting_parameters", "only allowed when 'logprobs' is true", context)
        check_tools(self.tools, self.tool_choice, self.parallel_tool_calls)
        if self.may_call and self.structured_outputs is not None:
            text = "cannot be combined with 'tools', unless 'tool_choice' is 'none'"
            raise PydanticCustomError("conflicting_parameters", text, {"at": "structured_outputs"})
        return self

    @property
    def choice(self) -> ToolChoice:
        """Which tools the model may call."""
        return self.tool_choice or ToolChoice(mode="auto" if self.tools else "none")

    @property
    def may_call(self) -> bool:
        """Whether there are tools, and the model may call one."""
        return self.tools is not None and self.choice.mode != "none"


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = _GENERATION_UNSUPPORTED | {
        "best_of": _ANY,
        "echo": _FALSE,
        "suffix": _ANY,
    }

    prompt: Inputs
    """A text, texts, token ids, or lists of token ids; choices of prompt i are numbered i*n to i*n + n-1.

    ``max_tokens`` is 16 when absent, as at OpenAI.
    """
    logprobs: Annotated[int, Field(ge=0)] | None = None
    """Return the log-probability of every generated token, and of so many alternatives."""


class InputsRequest(ModelRequest):
    """What requests about whole texts have in common."""

    input: Inputs
    """A text, texts, token ids, or lists of token ids; one answer for each."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """Who asks, for the operator's logs."""

    @model_validator(mode="after")
    def _no_empty_text(self) -> "InputsRequest":
        for index, item in enumerate(self.input):
            if item == "":
                at = "input" if len(self.input) == 1 else f"input[{index}]"
                raise PydanticCustomError("empty_string", "expected some text", {"at": at})
        return self


class ClassificationRequest(InputsRequest):
    """Body of ``POST /v1/classify``; vLLM's ``/classify``, and no endpoint of OpenAI's."""


class EmbeddingRequest(InputsRequest):
    """Body of ``POST /v1/embeddings``."""

    encoding_format: Literal["float", "base64"] | None = None
    """``base64`` is the bytes of little-endian float32 numbers; default ``float``."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Only the model's own number of dimensions is possible."""


class TokenizeRequest(ModelRequest):
    """Body of ``POST /tokenize``: either ``prompt`` or ``messages``."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "chat_template": _ANY,
        "chat_template_kwargs": _ANY,
        "continue_final_message": _FALSE,
    }

    prompt: str | None = None
    """Text to tokenize."""
    messages: Messages | None = None
    """Conversation to render with the model's chat template and tokenize."""
    tools: Tools | None = None
    """Only with ``messages``: tools that the chat template shows to the model."""
    add_special_tokens: bool | None = None
    """Add the tokenizer's own special tokens to ``prompt``; default true."""
    add_generation_prompt: bool | None = None
    """End ``messages`` with the start of the assistant's turn; default true."""
    return_token_strs: bool | None = None
    """Return the text of every token too; default false."""

    @model_validator(mode="after")
    def _one_source(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            code = "missing_required_parameter" if self.prompt is None else "conflicting_parameters"
            raise PydanticCustomError(code, "give either 'prompt' or 'messages'", {"at": "prompt"})
        fields = {"add_special_tokens": "prompt", "add_generation_prompt": "messages", "tools": "messages"}
        for misplaced, other in fields.items():
            if getattr(self, misplaced) is not None and getattr(self, other) is None:
                context = {"at": misplaced, "other": other}
                raise PydanticCustomError("conflicting_parameters", "only allowed with '{other}'", context)
        return self


class DetokenizeRequest(ModelRequest):
    """Body of ``POST /detokenize``."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
    """Token ids, in order."""
