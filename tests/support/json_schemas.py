"""Random JSON schemas that a grammar can enforce, for hypothesis."""

from typing import Any

from hypothesis import strategies as st

_NAMES = st.sampled_from(["a", "name", "é", 'quo"te', "x y"])
_BOUNDS = st.integers(-1000, 1000)


@st.composite
def _integers(draw: st.DrawFn) -> dict[str, Any]:
    low = draw(_BOUNDS)
    return {"type": "integer", "minimum": low, "maximum": low + draw(st.integers(0, 500))}


@st.composite
def _numbers(draw: st.DrawFn) -> dict[str, Any]:
    low = draw(_BOUNDS)
    return {"type": "number", "minimum": low, "maximum": low + draw(st.integers(1, 500))}


@st.composite
def _strings(draw: st.DrawFn) -> dict[str, Any]:
    shortest = draw(st.integers(0, 3))
    return {"type": "string", "minLength": shortest, "maxLength": shortest + draw(st.integers(0, 5))}


@st.composite
def _objects(draw: st.DrawFn, values: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(_NAMES, values, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@st.composite
def _arrays(draw: st.DrawFn, values: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    fewest = draw(st.integers(0, 2))
    return {
        "type": "array",
        "items": draw(values),
        "minItems": fewest,
        "maxItems": fewest + draw(st.integers(0, 2)),
    }


_leaves = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]),
    st.lists(st.sampled_from([1, "one", None, True, "\u4e16"]), min_size=1, max_size=3, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
    _integers(),
    _numbers(),
    _strings(),
)

schemas = st.recursive(
    _leaves,
    lambda inner: (
        _objects(inner)
        | _arrays(inner)
        | st.lists(inner, min_size=1, max_size=2).map(lambda branches: {"anyOf": branches})
    ),
    max_leaves=6,
)
