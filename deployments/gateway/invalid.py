"""A request model and JSON values in; the checked request out, or an ApiError that names field, value and limit."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from deployments.gateway.body import printable, show
from deployments.gateway.errors import KINDS, ApiError
from deployments.gateway.fields import Body

AnyBody = TypeVar("AnyBody", bound=Body)

_EXPECTED = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "list_type": "an array",
    "model_type": "an object",
}
_LIMITS = {
    "greater_than": ("below_min_value", "gt", "a value above"),
    "greater_than_equal": ("below_min_value", "ge", "a value of at least"),
    "less_than": ("above_max_value", "lt", "a value below"),
    "less_than_equal": ("above_max_value", "le", "a value of at most"),
}
_CODES = {
    "literal_error": "unsupported_value",
    "finite_number": "invalid_value",
    "too_short": "empty_array",
    "too_long": "array_above_max_length",
    "string_too_short": "empty_string",
    "string_too_long": "string_above_max_length",
    "string_pattern_mismatch": "invalid_value",
}


def validate(kind: type[AnyBody], data: Any) -> AnyBody:
    """``data`` as a ``kind``; ApiError about the first field that is wrong."""
    if not isinstance(data, dict):
        raise ApiError("invalid_type", f"The request body must be a JSON object, got {show(data)}.")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0]) from error


def _explain(detail: ErrorDetails) -> ApiError:
    context: Mapping[str, Any] = detail.get("ctx", {})
    param = printable(_dotted((*detail["loc"], context["at"]) if context.get("at") else detail["loc"]))
    match detail["type"]:
        case "missing":
            return ApiError("missing_required_parameter", f"Missing required parameter: '{param}'.", param=param)
        case "unknown_parameter":
            return ApiError("unknown_parameter", f"Unknown parameter: '{param}'.", param=param)
        case "unsupported_parameter":
            message = f"Unsupported parameter: '{param}' cannot have this value here; leave it out."
            return ApiError("unsupported_parameter", message, param=param)
    code, problem = _problem(detail, context)
    return ApiError(code, f"Invalid '{param}': {problem}.", param=param)


def _dotted(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += f".{step}" if path and not step.startswith("[") else step
    return path


def _problem(detail: ErrorDetails, context: Mapping[str, Any]) -> tuple[str, str]:
    """The error's code and what is wrong, in words."""
    name, value = detail["type"], show(detail["input"])
    if name in _LIMITS:
        code, key, words = _LIMITS[name]
        return code, f"expected {words} {_plain(context[key])}, got {value}"
    if name in _CODES:
        return _CODES[name], _broken_rule(name, context, value)
    if name in KINDS:
        return name, printable(detail["msg"], 300)
    return "invalid_type", f"expected {_EXPECTED.get(name, 'another type')}, got {value}"


def _broken_rule(name: str, context: Mapping[str, Any], value: str) -> str:
    match name:
        case "literal_error":
            return f"expected {context['expected']}, got {value}"
        case "finite_number":
            return "expected a finite number"
        case "too_long":
            return f"expected at most {context['max_length']} items, got {context['actual_length']}"
        case "string_pattern_mismatch":
            return f"expected text that matches {context['pattern']}, got {value}"
        case "string_too_long":
            return f"expected at most {context['max_length']} characters"
    return "expected at least one item" if name == "too_short" else "expected some text, got an empty string"


def _plain(limit: float) -> str:
    return str(int(limit)) if float(limit).is_integer() and not isinstance(limit, int) else str(limit)
