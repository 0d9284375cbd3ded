"""YAML text becomes plain dicts, lists and scalars, with the place of every entry and every mistake of the text.

Stricter than YAML 1.1 on purpose: a key written twice, ``yes``/``on`` for true, ``010`` for eight and ``1:30`` for
ninety are refused, because readers of the file would disagree about what they mean.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from cluster.config.findings import Finding, Location, Place, shorten

MAX_TEXT_CHARACTERS = 2**20
MAX_DEPTH = 40
MAX_ENTRIES = 20_000
"""Entries after aliases are expanded; more is an alias bomb, or a file nobody reads."""

_NUMBER_TO_OTHERS = re.compile(r"[-+]?0[0-9]+|[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
"""Text to PyYAML, and a number to JSON and YAML 1.2: 007 and 5e-5. The first is refused, the second read as one."""
_TAG = "tag:yaml.org,2002:"
_QUOTE = "put it in quotes if it is meant as text"


class Unreadable:
    """Stands in the tree for a value that was refused already, so that nobody complains about it again."""


UNREADABLE: Final = Unreadable()


@dataclass(slots=True, kw_only=True)
class Tree:
    """What a text holds: ``data``, the ``places`` of its entries, and the ``findings`` made on the way."""

    data: Any = UNREADABLE
    places: dict[Location, Place] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's composer, which recurses, with a bound on the depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", _mark_of_next(self))
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _mark_of_next(loader: yaml.SafeLoader) -> Any:
    return loader.peek_event().start_mark  # type: ignore[no-untyped-call]


def read_tree(text: str) -> Tree:
    """The tree of ``text``; when it is no YAML at all, a tree without data and with the one finding."""
    if len(text) > MAX_TEXT_CHARACTERS:
        message = f"has {len(text)} characters"
        finding = Finding(at=(), message=message, limit=f"{MAX_TEXT_CHARACTERS}", remedy="write a smaller file")
        return Tree(findings=[finding])
    try:
        loader = _BoundedLoader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        return Tree(findings=[_syntax_finding(text, error)])
    if node is None:
        remedy = "write at least name, cluster and models; configs/quickstart.yaml is an example"
        return Tree(findings=[Finding(at=(), message="is empty", remedy=remedy)])
    reader = _TreeReader()
    reader.tree.data = reader.read(node, (), ())
    return reader.tree


_SYNTAX = (
    ("'\\t'", "a tab stands where YAML wants spaces", "indent with spaces"),
    ("another document", "a second document begins here", "keep one document in the file: remove the --- line"),
    (
        "mapping values are not allowed",
        "a second `: ` in one line",
        "indent the key on its own line, or quote the text",
    ),
    ("expected <block end>", "the indentation does not fit the lines above", "align keys that belong together"),
    ("could not find expected ':'", "a line without `: `", "write `key: value`"),
    ("nested too deeply", "is nested too deeply", f"use at most {MAX_DEPTH} levels"),
    ("expected ',' or '}'", "a { is not closed, or a comma is missing", "write {key: value, key: value}"),
    ("expected ',' or ']'", "a [ is not closed, or a comma is missing", "write [value, value]"),
    ("undefined alias", "an alias (*name) has no anchor (&name)", "define the anchor above it"),
    ("end of stream", "a quote is not closed", "close the quote"),
    ("unknown escape", "an unknown \\ escape in double quotes", "use single quotes, or write \\\\"),
    ("special characters", "a control character", "remove it"),
    ("expected the node content", "a value or a closing bracket is missing", "complete the line"),
    ("cannot start any token", "a character that text without quotes cannot begin with", "put the text in quotes"),
)


def _syntax_finding(text: str, error: yaml.YAMLError) -> Finding:
    said = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    for part, message, remedy in _SYNTAX:
        if part in f"{said} {getattr(error, 'context', '')}":
            return Finding(at=(), message=message, remedy=remedy, place=_syntax_place(text, error))
    return Finding(
        at=(),
        message=f"is not YAML: {said}",
        remedy="see the line, and the lines above it",
        place=_syntax_place(text, error),
    )


def _syntax_place(text: str, error: yaml.YAMLError) -> Place:
    marks = [getattr(error, "problem_mark", None), getattr(error, "context_mark", None)]
    if "quoted scalar" in str(getattr(error, "context", "")):
        marks.reverse()  # the quote that was opened says more than the end of the file
    mark = marks[0] or marks[1]
    if mark is not None:
        return Place(line=mark.line + 1, column=mark.column + 1)
    position = getattr(error, "position", 0)
    return Place(line=text.count("\n", 0, position) + 1, column=1)


class _TreeReader:
    """Walks PyYAML's nodes once; aliases are walked wherever they are used."""

    def __init__(self) -> None:
        self.tree = Tree()
        self._num_entries = 0

    def read(self, node: yaml.Node, at: Location, around: tuple[int, ...]) -> Any:
        """The plain value of ``node``; ``around`` holds the ids of the nodes it is inside of."""
        self._num_entries += 1
        if self._num_entries > MAX_ENTRIES:
            if self._num_entries == MAX_ENTRIES + 1:
                message = "has too many entries once its aliases are expanded"
                self._report(node, (), message, "use fewer aliases of aliases", limit=f"{MAX_ENTRIES}")
            return UNREADABLE
        if id(node) in around:
            return self._report(node, at, "contains itself through an alias", "remove the alias")
        self.tree.places.setdefault(at, _place(node))
        inside = (*around, id(node))
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, at, inside)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.read(item, (*at, index), inside) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, at)
        return self._report(node, at, f"has the tag {shorten(node.tag)}", "remove the tag")

    def _mapping(self, node: yaml.MappingNode, at: Location, around: tuple[int, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                merged.append(value_node)
                continue
            key = self._key(key_node, at)
            if key is None:
                continue
            if key in found:
                first = self.tree.places[(*at, key)].line
                message = f"is written twice, first in line {first}"
                self._report(key_node, (*at, key), message, "remove one of the two", value=_written(value_node))
                continue
            mark = key_node.start_mark
            place = Place(line=mark.line + 1, column=mark.column + 1, text=_written(value_node))
            self.tree.places[(*at, key)] = place
            found[key] = self.read(value_node, (*at, key), around)
        for value_node in merged:
            self._merge(value_node, found, at, around)
        return found

    def _merge(self, node: yaml.Node, found: dict[str, Any], at: Location, around: tuple[int, ...]) -> None:
        """Add the keys of ``<<: *anchor`` that ``found`` does not have itself."""
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(source, yaml.MappingNode):
                self._report(source, at, "`<<` merges something that has no keys", "write `<<: *anchor` of a mapping")
                continue
            if id(source) in around:
                self._report(source, at, "contains itself through `<<`", "remove the alias")
                continue
            inner = yaml.MappingNode(
                source.tag, list(_without(source, set(found))), source.start_mark, source.end_mark
            )
            found.update(self._mapping(inner, at, (*around, id(source))))

    def _key(self, node: yaml.Node, at: Location) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            self._report(node, at, "has a key that is not text", "write `key: value`")
            return None
        if node.tag not in (f"{_TAG}str", f"{_TAG}timestamp", f"{_TAG}value"):
            self._report(node, at, f"has the key {shorten(node.value)!r}, which is not text", "put the key in quotes")
            return None
        return str(node.value)

    def _scalar(self, node: yaml.ScalarNode, at: Location) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind in ("int", "float") or (node.style is None and _NUMBER_TO_OTHERS.fullmatch(text)):
            return self._number(node, at)
        if kind in ("str", "timestamp", "value", "merge"):
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return self._boolean(node, at)
        return self._report(node, at, f"has the tag {shorten(node.tag)}", "remove the tag")

    def _boolean(self, node: yaml.ScalarNode, at: Location) -> Any:
        text = node.value.lower()
        if text in ("true", "false"):
            return text == "true"
        message = f"`{shorten(node.value)}` is true or false to some readers of YAML and text to others"
        return self._report(node, at, message, f"write true or false; {_QUOTE}")

    def _number(self, node: yaml.ScalarNode, at: Location) -> Any:
        text = node.value.replace("_", "")
        if ":" in text:
            message = "is a number in base 60 to some readers of YAML (1:30 is 90)"
            return self._report(node, at, message, f"write a plain number, or one with a unit (90s); {_QUOTE}")
        if re.fullmatch(r"[-+]?0[0-9]+", text):
            message = "begins with 0, which is base 8 to some readers of YAML and base 10 to others"
            return self._report(node, at, message, f"write it without the leading 0; {_QUOTE}")
        if len(text) > 40:
            return self._report(node, at, "is a number too long to be meant", _QUOTE)
        try:
            return _parse_number(text)
        except ValueError:
            return self._report(node, at, "is not a number", "remove the tag in front of it, or write a number")

    def _report(
        self,
        node: yaml.Node,
        at: Location,
        message: str,
        remedy: str,
        *,
        limit: str | None = None,
        value: str | None = None,
    ) -> Unreadable:
        place = _place(node)
        finding = Finding(at=at, message=message, remedy=remedy, limit=limit, value=value or place.text, place=place)
        self.tree.findings.append(finding)
        return UNREADABLE


def _without(node: yaml.MappingNode, keys: set[str]) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    return (pair for pair in node.value if not (isinstance(pair[0], yaml.ScalarNode) and pair[0].value in keys))


def _parse_number(text: str) -> int | float:
    if re.fullmatch(r"[-+]?0[xb][0-9a-fA-F]+", text):
        return int(text, 0)
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.lower()))


def _place(node: yaml.Node) -> Place:
    return Place(line=node.start_mark.line + 1, column=node.start_mark.column + 1, text=_written(node))


def _written(node: yaml.Node) -> str | None:
    """The value of a scalar as it stands in the text, shortened; None for mappings and lists of more than scalars."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == f"{_TAG}null":
            return None
        quoted = node.style in ("'", '"')
        return shorten(f'"{node.value}"' if quoted and node.value.isprintable() else node.value)
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return shorten("[" + ", ".join(item.value for item in node.value[:32]) + "]")
    return None
