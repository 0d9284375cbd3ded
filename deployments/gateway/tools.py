"""Tools of a chat request: definitions and the choice among them enter as OpenAI writes them, and leave checked."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.gateway.fields import FUNCTION_NAME, Body, FunctionName, JsonObject

MAX_TOOLS = 128


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: FunctionName
    """Letters, digits, ``_`` and ``-``."""
    description: str | None = None
    """When and how to call it; the model reads this."""
    parameters: JsonObject | None = None
    """JSON schema of the arguments; absent: none."""
    strict: bool | None = None
    """Calls of it always fit ``parameters``, and a keyword that cannot be enforced is refused."""


class Tool(Body):
    """One tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> str:
        """The tool as chat templates know it, as JSON text."""
        function = self.function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        function.setdefault("parameters", {"type": "object", "properties": {}})
        return json.dumps({"type": "function", "function": function}, ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Whether the model may call, must call, or must call ``name``."""

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None


def _check_choice(value: Any) -> ToolChoice:
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            text = "expected 'none', 'auto', 'required', or an object that names a function"
            raise PydanticCustomError("unsupported_value", text, {"at": ""})
        return ToolChoice(mode=value)  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise PydanticCustomError("invalid_type", "expected a string or an object", {"at": ""})
    if value.get("type") != "function":
        raise PydanticCustomError("unsupported_value", "only type 'function' is supported", {"at": "type"})
    function = value.get("function")
    if set(value) != {"type", "function"} or not isinstance(function, dict) or set(function) != {"name"}:
        text = "expected an object with the member 'name', and nothing else beside it"
        raise PydanticCustomError("invalid_value", text, {"at": "function"})
    if not isinstance(function["name"], str):
        raise PydanticCustomError("invalid_type", "expected a string", {"at": "function.name"})
    return ToolChoice(mode="named", name=function["name"])


_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string", "pattern": FUNCTION_NAME}},
                    "required": ["name"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "function"],
            "additionalProperties": False,
        },
    ]
}

AnyToolChoice = Annotated[ToolChoice, PlainValidator(_check_choice), WithJsonSchema(_CHOICE_SCHEMA)]
Tools = Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


def check_tools(tools: list[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> None:
    """Raise where definitions and choice contradict each other; for the request's own validator."""
    if tools is None:
        if choice is not None and choice.mode != "none":
            raise PydanticCustomError("conflicting_parameters", "only allowed with 'tools'", {"at": "tool_choice"})
        if parallel is not None:
            context = {"at": "parallel_tool_calls"}
            raise PydanticCustomError("conflicting_parameters", "only allowed with 'tools'", context)
        return
    names = [tool.function.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            context = {"at": f"tools[{index}].function.name", "name": name}
            raise PydanticCustomError("invalid_value", "'{name}' is defined twice", context)
    if choice is not None and choice.name is not None and choice.name not in names:
        context = {"at": "tool_choice.function.name", "name": choice.name[:64]}
        raise PydanticCustomError("invalid_value", "'{name}' is not one of 'tools'", context)
