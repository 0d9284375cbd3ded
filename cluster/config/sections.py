"""Plain data becomes a ``ClusterConfig`` of which the wrong parts are missing, and a finding for each of them.

pydantic validates one whole object or none of it. Here every key is validated alone, so that rules between keys can
still be checked around a mistake: reading an attribute that was wrong raises ``NotParsed``, and the rule is skipped.
"""

import difflib
import re
from dataclasses import replace
from functools import cache
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from cluster.config.base import StrictModel
from cluster.config.findings import Finding, Location, shorten
from cluster.config.wording import describe_error, either
from cluster.config.yaml_tree import UNREADABLE

Section = TypeVar("Section", bound=StrictModel)

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)

_RESOURCES_CALLED_SO = {"cores": "CPU", "mem": "memory", "ram": "memory"}
"""What people call Ray's built-in resources; as custom resources, nothing would ever use them."""


class SectionReader:
    """Reads sections key by key and collects ``findings``."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def read(self, section: type[Section], data: object, at: Location) -> Section:
        """An instance of ``section`` with those keys of ``data`` that are right; reading another raises NotParsed."""
        if data is UNREADABLE:
            return _construct(section, {})
        expanded = section.expand(data)
        if expanded is not data:
            return self._read_expanded(section, expanded, at)
        if not isinstance(data, dict):
            self._no_mapping(section, data, at)
            return _construct(section, {})
        meant = self._further_keys(section, data, at)
        values: dict[str, object] = {}
        for name, field in section.model_fields.items():
            if name in data:
                values[name] = self._value(section, name, data[name], (*at, name))
            elif not field.is_required():
                values[name] = field.get_default(call_default_factory=True)
            elif name not in meant:
                self._missing(field, (*at, name))
        instance = _construct(section, values)
        for name, value in self._extras(section, data):
            self._extra(section, instance, name, value, at)
        return instance

    def _read_expanded(self, section: type[Section], data: object, at: Location) -> Section:
        """As :meth:`read`; what is wrong with the parts is told of the short text that they were made of."""
        reader = SectionReader()
        instance = reader.read(section, data, at)
        self.findings += [replace(finding, at=at) for finding in reader.findings]
        return instance

    def _no_mapping(self, section: type[StrictModel], data: object, at: Location) -> None:
        message = "has no value" if data is None else "must be a mapping of keys to values"
        remedy = f"write keys and values in it; it may have {', '.join(section.model_fields)}"
        if data is None and not any(field.is_required() for field in section.model_fields.values()):
            remedy += "; or remove the line to take the defaults"
        self.findings.append(Finding(at=at, message=message, remedy=remedy))

    def _further_keys(self, section: type[StrictModel], data: dict[str, object], at: Location) -> set[str]:
        """Report unknown keys; gives the known keys that they were probably meant to be."""
        known = list(section.model_fields)
        meant: set[str] = set()
        for key in data.keys() - set(known):
            closest = _meant_by(section, key)
            if _accepts_extra(section) and closest is None:
                continue
            if closest is not None:
                meant.add(closest)
            remedy = f"did you mean {closest}?" if closest is not None else "remove it, or use one of the known keys"
            finding = Finding(at=(*at, key), message="is not a known key", limit=", ".join(known), remedy=remedy)
            self.findings.append(finding)
        return meant

    def _extras(self, section: type[StrictModel], data: dict[str, object]) -> list[tuple[str, object]]:
        """The keys that are names of the user's own choice."""
        if not _accepts_extra(section):
            return []
        free = [key for key in data.keys() - section.model_fields.keys() if _meant_by(section, key) is None]
        return [(key, data[key]) for key in free]

    def _extra(
        self, section: type[StrictModel], instance: StrictModel, name: str, value: object, at: Location
    ) -> None:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.:-]*", name):
            limit, remedy = "letters, digits, _ . : and -, beginning with a letter", "choose another name"
            finding = Finding(at=(*at, name), message="is not a name for a resource", limit=limit, remedy=remedy)
            self.findings.append(finding)
            return
        read = self._leaf(_extra_adapter(section), value, (*at, name))
        if read is not UNREADABLE:
            (instance.__pydantic_extra__ or {})[name] = read

    def _missing(self, field: FieldInfo, at: Location) -> None:
        explained = (field.description or "").replace("``", "")
        remedy = f"add `{at[-1]}: ...`" + (f" ({explained.rstrip('.')})" if explained else "")
        self.findings.append(Finding(at=at, message="is missing", remedy=remedy))

    def _value(self, section: type[StrictModel], name: str, value: object, at: Location) -> object:
        """The value of one key, or UNREADABLE."""
        field = section.model_fields[name]
        if value is UNREADABLE:
            return UNREADABLE
        if value is None and type(None) in get_args(field.annotation):
            return None
        if field.discriminator == "kind":
            return self._by_kind(get_args(field.annotation), value, at)
        inner = _without_none(field.annotation)
        if _is_section(inner):
            return self.read(cast("type[StrictModel]", inner), value, at)
        items = get_args(inner)
        if get_origin(inner) is tuple and _is_section(items[0]):
            return self._list((items[0],), value, at, may_be_empty=not field.is_required())
        if get_origin(inner) is tuple and get_origin(items[0]) is Annotated and _is_section(_members(items[0])[0]):
            return self._list(_members(items[0]), value, at, may_be_empty=not field.is_required())
        if get_origin(inner) is dict and _is_section(items[1]):
            return self._named(items[1], value, at)
        return self._leaf(_adapter(section, name), value, at)

    def _by_kind(self, sections: tuple[type[StrictModel], ...], value: object, at: Location) -> object:
        kinds = {kind: section for section in sections for kind in get_args(section.model_fields["kind"].annotation)}
        if not isinstance(value, dict) or "kind" not in value:
            remedy = f"write `kind: {next(iter(kinds))}` and the keys of that kind"
            message = "must say its kind"
            self.findings.append(Finding(at=at, message=message, limit=either(list(kinds)), remedy=remedy))
            return UNREADABLE
        kind = value["kind"]
        if kind is UNREADABLE:
            return UNREADABLE
        if not isinstance(kind, str) or kind not in kinds:
            closest = closest_of(str(kind), list(kinds))
            remedy = f"did you mean {closest}?" if closest else f"choose {either(list(kinds))}"
            message, limit = "is not a known kind", either(list(kinds))
            self.findings.append(Finding(at=(*at, "kind"), message=message, limit=limit, remedy=remedy))
            return UNREADABLE
        return self.read(kinds[kind], value, at)

    def _list(
        self, sections: tuple[type[StrictModel], ...], value: object, at: Location, *, may_be_empty: bool
    ) -> object:
        """Entries of one section, or of several that are told apart by their kind."""
        if not isinstance(value, list) or not (value or may_be_empty):
            message = "must be a list" if not isinstance(value, list) else "has no entries"
            keys = ", ".join(sections[0].model_fields) if len(sections) == 1 else "kind, and those of that kind"
            limit = "a list" if may_be_empty else "a list of at least one entry"
            remedy = f"begin each entry with `- `, and write its keys: {keys}"
            self.findings.append(Finding(at=at, message=message, limit=limit, remedy=remedy))
            return UNREADABLE
        places = [(item, (*at, index)) for index, item in enumerate(value)]
        if len(sections) == 1:
            return tuple(self.read(sections[0], item, place) for item, place in places)
        return tuple(self._by_kind(sections, item, place) for item, place in places)

    def _named(self, section: type[StrictModel], value: object, at: Location) -> object:
        """A mapping of names of the user's choice to sections."""
        if not isinstance(value, dict) or not value:
            remedy = f"write a name in each line, and behind it {', '.join(section.model_fields)}"
            finding = Finding(at=at, message="must be a mapping with at least one name", remedy=remedy)
            self.findings.append(finding)
            return UNREADABLE
        return {name: self.read(section, item, (*at, name)) for name, item in value.items()}

    def _leaf(self, adapter: TypeAdapter[Any], value: object, at: Location) -> object:
        if _holds_unreadable(value):
            return UNREADABLE
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            schema = _schema_of(adapter)
            self.findings += [
                describe_error(details, value, schema, at) for details in error.errors(include_url=False)
            ]
            return UNREADABLE


def _meant_by(section: type[StrictModel], key: str) -> str | None:
    """The known key that the unknown ``key`` was probably meant to be; sure guesses only, where keys are free."""
    known = list(section.model_fields)
    if not _accepts_extra(section):
        return closest_of(key, known)
    return _RESOURCES_CALLED_SO.get(key.lower()) or closest_of(key, known, cutoff=0.8)


def closest_of(word: str, known: list[str], cutoff: float = 0.6) -> str | None:
    """The known word that ``word`` was probably meant to be."""
    by_lower = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(shorten(word).lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[matches[0]] if matches else None


def _construct(section: type[Section], values: dict[str, object]) -> Section:
    """An instance without the attributes that ``values`` lacks or holds as UNREADABLE."""
    good = {name: value for name, value in values.items() if value is not UNREADABLE}
    instance = cast("Section", section.model_construct(None, **good))
    for name in section.model_fields.keys() - good.keys():
        instance.__dict__.pop(name, None)
    return instance


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, StrictModel)


def _without_none(annotation: object) -> object:
    """``Section`` of ``Section | None``; anything else as it is."""
    branches = [branch for branch in get_args(annotation) if branch is not type(None)]
    return branches[0] if len(branches) == 1 and get_origin(annotation) in (Union, UnionType) else annotation


def _members(annotated: object) -> tuple[type[StrictModel], ...]:
    """The branches of an annotated union."""
    union = get_args(annotated)[0]
    return get_args(union) or (union,)


def _accepts_extra(section: type[StrictModel]) -> bool:
    return section.model_config.get("extra") == "allow"


def _holds_unreadable(value: object) -> bool:
    if isinstance(value, dict):
        return any(_holds_unreadable(item) for item in value.values())
    return value is UNREADABLE or (isinstance(value, list) and any(_holds_unreadable(item) for item in value))


@cache
def _adapter(section: type[StrictModel], name: str) -> TypeAdapter[Any]:
    field = section.model_fields[name]
    return TypeAdapter(cast("type[Any]", Annotated[field.annotation, field]), config=_STRICT)


@cache
def _extra_adapter(section: type[StrictModel]) -> TypeAdapter[Any]:
    """Of the values behind keys that are free, the second argument of ``dict[str, ...]``."""
    annotation = get_type_hints(section, include_extras=True)["__pydantic_extra__"]
    return TypeAdapter(get_args(annotation)[1], config=_STRICT)


@cache
def _schema_of(adapter: TypeAdapter[Any]) -> dict[str, Any]:
    return adapter.json_schema()
