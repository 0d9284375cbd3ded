"""The messages of a chat request: each enters as a client wrote it and leaves checked, its parts in agreement."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.gateway.fields import FUNCTION_NAME, Body, FunctionName, content_parts

_ANY: tuple[Any, ...] = ()
_MAX_CALLS = 128

CallId = Annotated[str, Field(min_length=1, max_length=256)]


class TextPart(Body):
    """One part of a message's content; text is the only kind these models read."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        """Name the kind of part before the fields that come with it."""
        if isinstance(data, dict) and data.get("type", "text") != "text":
            context = {"at": "type"}
            raise PydanticCustomError("unsupported_value", "this model reads only parts of type 'text'", context)
        return data


class CalledFunction(Body):
    """What the assistant called, and with what."""

    name: FunctionName
    arguments: str
    """A JSON object as text; an empty text is one without members."""

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> "CalledFunction":
        try:
            msgspec.json.decode(self.arguments or "{}", type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError) as error:
            context = {"at": "arguments", "reason": str(error)}
            raise PydanticCustomError("invalid_value", "expected a JSON object as text: {reason}", context) from error
        return self


class PastCall(Body):
    """One call of an earlier turn."""

    id: CallId
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Body):
    """One turn of a conversation."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "annotations": ([],),
        "audio": _ANY,
        "function_call": _ANY,
        "refusal": _ANY,
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """``developer`` is read as ``system``, which is what chat templates know."""
    content: Annotated[list[TextPart], Field(min_length=1, fail_fast=True), *content_parts(TextPart)] | None = None
    """Text, or a list of text parts, which are joined without a separator; an assistant that calls needs none."""
    tool_calls: Annotated[list[PastCall], Field(max_length=_MAX_CALLS, fail_fast=True)] | None = None
    """What the assistant called in this turn."""
    tool_call_id: CallId | None = None
    """Which call a tool's turn answers."""
    name: Annotated[str, Field(pattern=FUNCTION_NAME)] | None = None
    """The function that a tool's turn comes from."""

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("missing_required_parameter", "a message needs content", {"at": "content"})
        if self.tool_call_id is None and self.role == "tool":
            text = "a message of role 'tool' says which call it answers"
            raise PydanticCustomError("missing_required_parameter", text, {"at": "tool_call_id"})
        for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool"), ("name", "tool")):
            if getattr(self, name) is not None and self.role != role:
                context = {"at": name, "role": role}
                raise PydanticCustomError("conflicting_parameters", "only allowed with role '{role}'", context)
        return self

    @property
    def text(self) -> str:
        """The whole content."""
        return "".join(part.text for part in self.content or ())


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
