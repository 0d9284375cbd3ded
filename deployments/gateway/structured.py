"""What the text of an answer must look like: OpenAI's and vLLM's fields for it enter, a Grammar leaves."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from deployments.gateway.fields import FUNCTION_NAME, Body, JsonObject, check_json_object
from deployments.messages import Grammar

_ANY: tuple[Any, ...] = ()
_FALSE: tuple[Any, ...] = (False,)
MAX_CHOICES = 4096

ANY_OBJECT: dict[str, Any] = {"type": "object"}
"""The schema of any JSON object."""


class JsonSchemaFormat(Body):
    """A schema and how strictly it holds."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    """What the schema is called; it changes nothing."""
    description: str | None = None
    """What the schema is for; the model is not told."""
    definition: Annotated[JsonObject | None, Field(alias="schema")] = None
    """JSON schema of the answer; absent: any object. Members are written in the order of ``properties``."""
    strict: bool | None = None
    """True: a keyword that cannot be enforced is refused. Else it is left to the model, as at OpenAI."""


class ResponseFormat(Body):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    """``json_object`` is any object, ``json_schema`` what the schema says."""
    json_schema: JsonSchemaFormat | None = None
    """Only with type ``json_schema``, and needed there."""

    @model_validator(mode="after")
    def _schema_fits_type(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            text = "needed with type 'json_schema'"
            raise PydanticCustomError("missing_required_parameter", text, {"at": "json_schema"})
        if self.type != "json_schema" and self.json_schema is not None:
            text = "only allowed with type 'json_schema'"
            raise PydanticCustomError("conflicting_parameters", text, {"at": "json_schema"})
        return self

    def grammar(self) -> Grammar | None:
        """What it asks for; None for free text."""
        if self.type == "text":
            return None
        schema = self.json_schema.definition if self.json_schema is not None else None
        is_strict = self.json_schema is None or bool(self.json_schema.strict)
        text = json.dumps(ANY_OBJECT if schema is None else schema, ensure_ascii=False)
        return Grammar(kind="json_schema", text=text, lenient=not is_strict, param="response_format")


def _check_schema(value: Any) -> dict[str, Any]:
    """A JSON schema as an object, or as JSON text."""
    if not isinstance(value, str):
        return check_json_object(value)
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError) as error:
        context = {"at": "", "reason": str(error)}
        raise PydanticCustomError("invalid_value", "expected a JSON schema: {reason}", context) from error
    return check_json_object(decoded)


_SCHEMA_OR_TEXT = {"anyOf": [{"type": "object"}, {"type": "string"}]}
Choices = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)
]


class StructuredOutputs(Body):
    """vLLM's ``structured_outputs``: exactly one of its fields."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "disable_additional_properties": _FALSE,
        "disable_any_whitespace": _FALSE,
        "disable_fallback": _FALSE,
        "structural_tag": _ANY,
        "whitespace_pattern": _ANY,
    }

    definition: Annotated[
        dict[str, Any] | None, PlainValidator(_check_schema), WithJsonSchema(_SCHEMA_OR_TEXT), Field(alias="json")
    ] = None
    """A JSON schema, as an object or as text; a keyword that cannot be enforced is refused."""
    regex: Annotated[str, Field(min_length=1)] | None = None
    """A regular expression that matches the whole text; Rust's syntax, without look-around."""
    choice: Choices | None = None
    """The texts to choose from."""
    grammar: Annotated[str, Field(min_length=1)] | None = None
    """A context-free grammar in llguidance's dialect of Lark, with a rule ``start``."""
    json_object: Literal[True] | None = None
    """Any JSON object."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "StructuredOutputs":
        if len(self.model_fields_set) != 1:
            text = "give exactly one of 'json', 'regex', 'choice', 'grammar' and 'json_object'"
            code = "conflicting_parameters" if self.model_fields_set else "missing_required_parameter"
            raise PydanticCustomError(code, text)
        return self

    def constraint(self) -> Grammar:
        """What it asks for."""
        if self.regex is not None:
            return Grammar(kind="regex", text=self.regex, param="structured_outputs")
        if self.grammar is not None:
            return Grammar(kind="lark", text=self.grammar, param="structured_outputs")
        if self.choice is not None:
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in self.choice)
            return Grammar(kind="lark", text=f"start: {texts}", param="structured_outputs")
        schema = ANY_OBJECT if self.definition is None else self.definition
        return Grammar(kind="json_schema", text=json.dumps(schema, ensure_ascii=False), param="structured_outputs")
