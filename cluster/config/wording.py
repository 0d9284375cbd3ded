"""One pydantic error becomes one Finding in plain words: what is wrong, what is allowed, what to write instead."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic_core import ErrorDetails

from cluster.config.base import REFUSED
from cluster.config.findings import Finding, Location

_MESSAGES = {
    "int_type": "is not a whole number",
    "int_parsing": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_type": "is not a number",
    "float_parsing": "is not a number",
    "finite_number": "is not a finite number",
    "bool_type": "is neither true nor false",
    "string_type": "is not text",
    "string_pattern_mismatch": "contains characters that are not allowed",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "is not one of the choices",
    "tuple_type": "is not a list",
    "list_type": "is not a list",
    "dict_type": "is not a mapping of keys to values",
    "missing": "has too few entries",
    "too_short": "has fewer than {min_length} entries",
    "too_long": "has more than {max_length} entries",
}


def describe_error(details: ErrorDetails, value: object, schema: Mapping[str, Any], at: Location) -> Finding:
    """``details`` about ``value``, which stands at ``at`` and whose JSON schema is ``schema``, as a Finding."""
    context = details.get("ctx", {})
    if details["type"] == REFUSED:
        return Finding(at=at, message=context["message"], limit=context["limit"], remedy=context["remedy"])
    inside: list[str | int] = []
    for part in details["loc"]:
        known = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        if part not in known:
            continue  # a branch of a union, or a place that is missing
        value = value[part]  # type: ignore[index]  # it is one of the two
        inside.append(part)
        schema = _items_of(schema)
    allowed = allowed_by(schema)
    if value is None:
        message = "has no value"
    else:
        message = _MESSAGES.get(details["type"], "is not allowed here").format(**context)
    return Finding(at=(*at, *inside), message=message, limit=allowed, remedy=_remedy(details["type"], value, schema))


def allowed_by(schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words: ``auto or a whole number from 1 to 64``."""
    for union in ("oneOf", "anyOf"):
        if union in schema:
            return either([allowed_by(branch) for branch in schema[union] if branch.get("type") != "null"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return either([str(choice) for choice in schema["enum"]])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range_of(schema)
    if kind == "array" and "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}, each {allowed_by(schema['prefixItems'][0])}"
    if kind == "array":
        return f"a list, each {allowed_by(schema.get('items', {}))}"
    return {"boolean": "true or false", "string": "text", "object": "a mapping"}.get(
        str(kind), "another kind of value"
    )


def either(choices: list[str]) -> str:
    """``a, b or c``."""
    return " or ".join([", ".join(choices[:-1]), choices[-1]]) if len(choices) > 1 else "".join(choices)


def _range_of(schema: Mapping[str, Any]) -> str:
    bounds = {"exclusiveMinimum": "more than", "minimum": "at least"}
    bounds |= {"exclusiveMaximum": "less than", "maximum": "at most"}
    said = [f"{words} {schema[key]}" for key, words in bounds.items() if key in schema]
    if "exclusiveMinimum" in schema or "exclusiveMaximum" in schema:
        return " of " + " and ".join(said)
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f" of at least {low}"
    return f" of at most {high}" if high is not None else ""


def _items_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    for branch in schema.get("anyOf", (schema,)):
        for key in ("items", "additionalProperties"):
            if isinstance(branch.get(key), dict):
                items: Mapping[str, Any] = branch[key]
                return items
        if "prefixItems" in branch:
            first: Mapping[str, Any] = branch["prefixItems"][0]
            return first
    return schema


def _remedy(error_type: str, value: object, schema: Mapping[str, Any]) -> str:
    """What to write instead."""
    allowed = allowed_by(schema)
    if value is None:
        return f"write {allowed}, or remove the line to take the default"
    if isinstance(value, str) and error_type.startswith(("int_", "float_", "bool_")) and _reads_as_number(value):
        return f"write {value.strip()} without quotes"
    if isinstance(value, float) and value.is_integer() and error_type.startswith("int_"):
        return f"write {value:.0f}"
    if error_type == "literal_error":
        return _nearest_choice(value, schema)
    if error_type in ("tuple_type", "list_type"):
        return f"write {allowed}, in brackets and with commas: [..., ...]"
    if error_type == "string_type":
        return "put it in quotes"
    return f"write {allowed}"


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.strip().lower() in ("true", "false")
    return True


def _nearest_choice(value: object, schema: Mapping[str, Any]) -> str:
    choices = [str(choice) for choice in schema.get("enum", ())]
    matches = difflib.get_close_matches(str(value).lower(), [choice.lower() for choice in choices], n=1, cutoff=0.5)
    for choice in choices:
        if matches and choice.lower() == matches[0]:
            return f"did you mean {choice}?"
    return f"write {allowed_by(schema)}"
