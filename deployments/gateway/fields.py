"""Types of request fields that OpenAI writes in several shapes: each enters in any of them and leaves in one."""

import re
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_TOKEN_ID = 2**31 - 1
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_STOP_CHARACTERS = 1024
MAX_INPUTS = 2048
MAX_JSON_DEPTH = 64
FUNCTION_NAME = "^[a-zA-Z0-9_-]{1,64}$"

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)


class Body(BaseModel):
    """Base of request objects: unknown fields refused, types exact, null the same as absent.

    ``unsupported`` names fields that OpenAI has and Manta does not, each with the values that ask for nothing:
    those are accepted, any other is refused under its own name.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {name: value for name, value in data.items() if cls._is_known(name, value)}
        return {name: value for name, value in known.items() if value is not None}

    @classmethod
    def _is_known(cls, name: str, value: Any) -> bool:
        """Whether the field is to be validated; raises for one that nobody may give, at the first of them."""
        if name in _names(cls):
            return True
        if name not in cls.unsupported:
            raise PydanticCustomError("unknown_parameter", "no such parameter", {"at": name})
        neutral = cls.unsupported[name]
        if value is None or any(type(value) is type(other) and value == other for other in neutral):
            return False
        raise PydanticCustomError("unsupported_parameter", "not supported here; leave it out", {"at": name})


@cache
def _names(model: type[Body]) -> frozenset[str]:
    """The fields of ``model`` as clients write them."""
    return frozenset(field.alias or name for name, field in model.model_fields.items())


def check_json_object(value: Any) -> dict[str, Any]:
    """``value`` when it is a JSON object of bounded depth, so that writing and reading it again cannot fail."""
    if not isinstance(value, dict):
        raise _wrong_type("", "an object")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [item for outer in level for item in _members(outer)]
        if not level:
            return value
    context = {"at": "", "limit": MAX_JSON_DEPTH}
    raise PydanticCustomError("invalid_value", "nested more than {limit} levels deep", context)


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _one_to_list(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return value
    raise _wrong_type("", "a string or an array of strings")


def _text_to_parts(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        return value
    raise _wrong_type("", "a string or an array of text parts")


def _wrong_type(at: str, expected: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_type", "expected {expected}", {"at": at, "expected": expected})


def _is_token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKEN_ID


def _check_token_ids(value: list[Any], at: str) -> tuple[int, ...]:
    for index, item in enumerate(value):
        if not _is_token_id(item):
            raise _wrong_type(f"{at}[{index}]", f"a token id from 0 to {MAX_TOKEN_ID}")
    return tuple(value)


def _check_inputs(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Text, texts, token ids or lists of token ids, as a tuple of texts or of token id tuples."""
    if isinstance(value, str):
        return (value,)
    expected = "a string, an array of strings, an array of token ids or an array of arrays of token ids"
    if not isinstance(value, list):
        raise _wrong_type("", expected)
    if not value:
        raise PydanticCustomError("empty_array", "expected at least one item", {"at": ""})
    if type(value[0]) is int:
        return (_check_token_ids(value, ""),)
    if len(value) > MAX_INPUTS:
        context = {"at": "", "limit": MAX_INPUTS, "actual": len(value)}
        raise PydanticCustomError("array_above_max_length", "expected at most {limit} items, got {actual}", context)
    if not isinstance(value[0], str | list):
        raise _wrong_type("[0]", expected)
    return tuple(_check_input(item, type(value[0]), f"[{index}]") for index, item in enumerate(value))


def _check_input(item: Any, kind: type[Any], at: str) -> str | tuple[int, ...]:
    if not isinstance(item, kind):
        raise _wrong_type(at, "a string like the first item" if kind is str else "an array like the first item")
    if isinstance(item, str):
        return item
    if not item:
        raise PydanticCustomError("empty_array", "expected at least one token id", {"at": at})
    return _check_token_ids(item, at)


def _check_biases(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise _wrong_type("", "an object of token ids and biases")
    if len(value) > MAX_LOGIT_BIASES:
        context = {"at": "", "limit": MAX_LOGIT_BIASES, "actual": len(value)}
        raise PydanticCustomError("array_above_max_length", "expected at most {limit} entries, got {actual}", context)
    return {_check_bias_key(key): _check_bias(key, bias) for key, bias in value.items()}


def _check_bias_key(key: str) -> int:
    if not _TOKEN_ID.fullmatch(key) or int(key) > MAX_TOKEN_ID:
        context = {"at": "", "key": key[:40], "limit": MAX_TOKEN_ID}
        raise PydanticCustomError("invalid_value", "the key '{key}' is not a token id from 0 to {limit}", context)
    return int(key)


def _check_bias(key: str, bias: Any) -> float:
    if type(bias) not in (int, float):
        raise _wrong_type(key, "a number from -100 to 100")
    if not -100 <= bias <= 100:
        context = {"at": key}
        raise PydanticCustomError("invalid_value", "expected a bias from -100 to 100", context)
    return float(bias)


_TOKEN_IDS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
}
_INPUTS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": {"type": "string"}},
        _TOKEN_IDS_SCHEMA,
        {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": _TOKEN_IDS_SCHEMA},
    ]
}
_STOP_STRING_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOP_SCHEMA = {"anyOf": [_STOP_STRING_SCHEMA, {"type": "array", "items": _STOP_STRING_SCHEMA}]}
_BIASES_SCHEMA = {
    "type": "object",
    "maxProperties": MAX_LOGIT_BIASES,
    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}

FunctionName = Annotated[str, Field(pattern=FUNCTION_NAME)]
JsonObject = Annotated[dict[str, Any], PlainValidator(check_json_object), WithJsonSchema({"type": "object"})]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Inputs = Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(_check_inputs), WithJsonSchema(_INPUTS_SCHEMA)]
LogitBias = Annotated[dict[int, float], PlainValidator(_check_biases), WithJsonSchema(_BIASES_SCHEMA)]
# Every choice carries its own copies of them to every stage.
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[
    list[StopString], Field(fail_fast=True), BeforeValidator(_one_to_list), WithJsonSchema(_STOP_SCHEMA)
]


def content_parts(part: type[BaseModel]) -> tuple[BeforeValidator, WithJsonSchema]:
    """Annotations of a message's content: text, or a non-empty list of ``part``; text becomes one part."""
    schema = {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "items": {"$ref": f"#/components/schemas/{part.__name__}"}},
        ]
    }
    return BeforeValidator(_text_to_parts), WithJsonSchema(schema)
