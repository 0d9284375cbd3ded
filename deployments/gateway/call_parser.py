"""Generated text enters in pieces, content and calls of tools leave, as soon as they are certain.

What leaves is a function of the whole text, however it was cut. Text that begins like a call and turns out to be none
is content; once the name of a function has left, the rest of the call belongs to it, well-formed or not.
"""

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from deployments.gateway.object_reader import SPACE, BrokenJson, ObjectReader, decode_string
from deployments.messages import ToolFormat

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_ARGUMENT_KEYS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class Content:
    """More of the message's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """The ``index``-th call is of ``name``."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the ``index``-th call's arguments, as JSON text."""

    index: int
    text: str


Piece = Content | CallBegins | Arguments


class CallReader:
    """One call written as an object with a name and arguments; tells both as soon as they are certain."""

    def __init__(self, index: int, names: frozenset[str] | None) -> None:
        """``names`` are the only functions it may be a call of; None: any."""
        self.begun = False
        self._object = ObjectReader()
        self._index = index
        self._names = names
        self._num_told = 0

    @property
    def ended(self) -> bool:
        """Whether the call is complete."""
        return self._object.ended

    def feed(self, character: str) -> Iterator[Piece]:
        """Take one more character; raises BrokenJson where it is no call."""
        self._object.feed(character)
        if not self.begun and "name" in self._object.complete:
            name = decode_string(self._object.members["name"])
            if not _NAME.fullmatch(name) or (self._names is not None and name not in self._names):
                raise BrokenJson
            self.begun = True
            yield CallBegins(self._index, name)
        if self.begun:
            yield from self._tell_arguments()
        elif self.ended:
            raise BrokenJson

    def _tell_arguments(self) -> Iterator[Piece]:
        members = self._object.members
        key = next((key for key in _ARGUMENT_KEYS if key in members), None)
        if key is None:
            if self.ended:
                yield Arguments(self._index, "{}")
            return
        text = members[key]
        if text.startswith('"'):  # some models write the arguments as text that holds JSON
            if key not in self._object.complete or self._num_told:
                return
            text = decode_string(text)
        if len(text) > self._num_told:
            yield Arguments(self._index, text[self._num_told :])
            self._num_told = len(text)


class NamedCallReader:
    """One call written as ``name[ARGS]{...}``, possibly with ``[CALL_ID]...`` between."""

    def __init__(self, index: int) -> None:
        self.begun = False
        self._index = index
        self._head = ""
        self._value = ObjectReader()

    @property
    def ended(self) -> bool:
        """Whether the call is complete."""
        return self._value.ended

    def feed(self, character: str) -> Iterator[Piece]:
        """Take one more character; raises BrokenJson where it is no call."""
        if self.begun:
            self._value.feed(character)
            yield Arguments(self._index, character)
            return
        self._head += character
        if character != "{":
            if len(self._head) > 256:
                raise BrokenJson
            return
        name, bracket, rest = self._head[:-1].partition("[")
        if not _NAME.fullmatch(name) or (bracket and not rest.rstrip().endswith("ARGS]")):
            raise BrokenJson
        self.begun = True
        yield CallBegins(self._index, name)
        self._value.feed(character)
        yield Arguments(self._index, character)


Script = Generator[None, str, None]
"""Receives one character at a time."""


class CallParser:
    """Takes one choice's text apart. ``names`` are the tools of the request."""

    def __init__(self, tool_format: ToolFormat, names: frozenset[str]) -> None:
        self.num_calls = 0
        self._names = names
        self._pieces: list[Piece] = []
        self._held = ""
        """What has come and not left: perhaps the beginning of a call, or white space before one."""
        self._reader: CallReader | NamedCallReader | None = None
        self._after_call = False
        """A call has just ended: white space, and ``_noise``, mean nothing."""
        self._noise = ""
        scripts = {"hermes": self._hermes, "llama3_json": self._llama3_json, "mistral": self._mistral}
        self._script = scripts[tool_format]()
        next(self._script)

    def feed(self, text: str) -> list[Piece]:
        """Take more text; what is certain now."""
        for character in text:
            self._held += character
            self._script.send(character)
        return self._take_pieces()

    def finish(self) -> list[Piece]:
        """What remains, when no more text comes."""
        in_call = self._reader is not None and self._reader.begun
        is_noise = self._after_call and self._noise.startswith(self._held.strip(SPACE))
        if not in_call and not is_noise:
            self._tell(len(self._held))
        return self._take_pieces()

    def _take_pieces(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return _joined(pieces)

    def _hermes(self) -> Script:
        while True:
            yield from self._text_until("<tool_call>")
            yield from self._call(CallReader(self.num_calls, None), closing="</tool_call>")

    def _mistral(self) -> Script:
        while True:
            yield from self._text_until("[TOOL_CALLS]")
            character = yield from self._visible()
            if character == "[":
                yield from self._list()
            elif character == "{":
                yield from self._call(CallReader(self.num_calls, None), character)
            else:
                yield from self._call(NamedCallReader(self.num_calls), character)

    def _llama3_json(self) -> Script:
        character = yield from self._visible()
        if character == "<" and (yield from self._expect("<|python_tag|>")):
            character = yield from self._visible()
        while character == "{":
            yield from self._call(CallReader(self.num_calls, self._names), character, closing=";")
            character = "" if self._held else (yield from self._visible())
        yield from self._text_until(None)

    def _list(self) -> Script:
        """Calls in square brackets, after the opening one."""
        character = yield from self._visible()
        while character != "]":
            yield from self._call(CallReader(self.num_calls, None), character)
            if not self._after_call:
                return
            self._noise = "]"
            character = yield from self._visible()
            if character == ",":
                self._held = ""
                character = yield from self._visible()
        self._held = ""

    def _call(self, reader: CallReader | NamedCallReader, first: str = "", closing: str = "") -> Script:
        """Read one call, whose first character has come already, and what closes it; content where it is none."""
        self._reader = reader
        while not reader.ended:
            character = first or (yield)
            first = ""
            try:
                for piece in reader.feed(character):
                    self.num_calls += isinstance(piece, CallBegins)
                    self._pieces.append(piece)
            except BrokenJson:
                if reader.begun:
                    yield from self._broken_arguments(closing)
                    break
                self._reader, self._after_call = None, False
                self._tell(len(self._held) - 1)  # the last character may begin a marker
                return
        self._reader, self._after_call, self._held = None, True, ""
        if closing:
            yield from self._skip(closing)

    def _broken_arguments(self, closing: str) -> Script:
        """The rest of a call that is no JSON is its arguments all the same."""
        index = self.num_calls - 1
        rest = self._held[-1]
        while not closing or not rest.endswith(closing):
            self._held = ""
            if not closing:
                self._pieces.append(Arguments(index, rest))
                rest = ""
            rest += yield
        self._pieces.append(Arguments(index, rest.removesuffix(closing)))

    def _text_until(self, marker: str | None) -> Script:
        """Let text leave as content until ``marker`` has come, which then is held; None: to the end."""
        while True:
            start = self._held.find(marker) if marker else -1
            if start >= 0:
                self._tell(len(self._held[:start].rstrip(SPACE)))
                return
            num_pending = _num_pending(self._held, marker) if marker else 0
            self._tell(len(self._held[: len(self._held) - num_pending].rstrip(SPACE)))
            yield

    def _skip(self, text: str) -> Script:
        """Let ``text`` go unheard; what comes instead of it stays held."""
        self._noise = text
        yield
        if (yield from self._expect(text)):
            self._held = ""

    def _expect(self, text: str) -> Generator[None, str, bool]:
        """Hold what comes, from its first character on, until it is ``text`` or something else; whether it is."""
        while True:
            held = self._held.strip(SPACE)
            if held == text or not text.startswith(held):
                return held == text
            yield

    def _visible(self) -> Generator[None, str, str]:
        """The next character that is not white space."""
        while True:
            character = yield
            if character not in SPACE:
                return character

    def _tell(self, num_characters: int) -> None:
        """Let the first of the held characters leave as content."""
        text, self._held = self._held[:num_characters], self._held[num_characters:]
        text = text.lstrip(SPACE) if self._after_call else text
        if text:
            self._after_call = False
            self._pieces.append(Content(text))


def _num_pending(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that begins ``marker``."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring pieces of the same kind as one."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        match last, piece:
            case Content(), Content():
                joined[-1] = Content(last.text + piece.text)
            case Arguments(), Arguments() if last.index == piece.index:
                joined[-1] = Arguments(piece.index, last.text + piece.text)
            case _:
                joined.append(piece)
    return joined
