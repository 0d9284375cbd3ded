"""Characters of one JSON object in, the raw text of its members out, complete or not."""

from enum import Enum, auto

import msgspec

SPACE = " \t\n\r"


class BrokenJson(Exception):
    """The text is not what it began as."""


class _At(Enum):
    """Where a JSON object is being read."""

    START = auto()
    KEY = auto()
    IN_KEY = auto()
    COLON = auto()
    VALUE = auto()
    IN_VALUE = auto()
    AFTER_VALUE = auto()
    END = auto()


class ObjectReader:
    """Reads one JSON object, character by character; keeps the raw text of every member's value."""

    def __init__(self) -> None:
        self.members: dict[str, str] = {}
        self.complete: set[str] = set()
        """Names of members whose value is complete."""
        self._at = _At.START
        self._key = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def ended(self) -> bool:
        """Whether the object is complete."""
        return self._at is _At.END

    def feed(self, character: str) -> None:
        """Take one more character; raises BrokenJson where it cannot be JSON."""
        if self._at in (_At.IN_KEY, _At.IN_VALUE):
            (self._in_key if self._at is _At.IN_KEY else self._in_value)(character)
            return
        if character in SPACE:
            return
        match self._at, character:
            case _At.START, "{":
                self._at = _At.KEY
            case _At.KEY, '"':
                self._key, self._at = '"', _At.IN_KEY
            case (_At.KEY, "}") | (_At.AFTER_VALUE, "}"):
                self._at = _At.END
            case _At.AFTER_VALUE, ",":
                self._at = _At.KEY
            case _At.COLON, ":":
                self._at = _At.VALUE
            case _At.VALUE, _:
                self._begin_value(character)
            case _:
                raise BrokenJson

    def _in_key(self, character: str) -> None:
        self._key += character
        if character == '"' and not self._escaped:
            self._key = decode_string(self._key)
            self._at = _At.COLON
        self._escaped = character == "\\" and not self._escaped

    def _begin_value(self, character: str) -> None:
        if character in ",:}]" or self._key in self.members:
            raise BrokenJson
        self.members[self._key] = ""
        self._at = _At.IN_VALUE
        self._depth = 0
        self._in_value(character)

    def _in_value(self, character: str) -> None:
        is_scalar = self._depth == 0 and not self._in_string and self.members[self._key] != ""
        if is_scalar and (character in ",}" or character in SPACE):
            self._end_value()
            self.feed(character)
            return
        self.members[self._key] += character
        if self._in_string:
            self._in_string = character != '"' or self._escaped
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        else:
            return
        if self._depth == 0 and not self._in_string:
            self._end_value()

    def _end_value(self) -> None:
        self.complete.add(self._key)
        self._at = _At.AFTER_VALUE


def decode_string(raw: str) -> str:
    """The text of a JSON string; raises BrokenJson."""
    try:
        return msgspec.json.decode(raw.encode(), type=str)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise BrokenJson from error
