"""What every section of the config is made of: ``StrictModel``, the annotated value types, and ``refuse``."""

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cluster.units import exact_bytes, exact_seconds, parse_bytes, parse_seconds

REFUSED = "refused"
"""Error type of everything that ``refuse`` raises; its context holds the finished sentences."""


class NotParsed(Exception):
    """The value of this key was wrong, so rules that need it cannot be checked."""


class StrictModel(BaseModel):
    """One mapping of the YAML: unknown keys refused, frozen, no silent conversion of types."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def expand(cls, data: object) -> object:
        """``data`` in full, where a section may be written shorter than as a mapping."""
        return data

    @model_validator(mode="before")
    @classmethod
    def _in_full(cls, data: object) -> object:
        return cls.expand(data)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Only reached for attributes that are not there: one whose value was wrong in the YAML says so."""
            if name in type(self).model_fields:
                raise NotParsed(name)
            return super().__getattr__(name)


def refuse(message: str, *, limit: str | None = None, remedy: str | None = None) -> NoReturn:
    """Reject the value under validation with sentences that reach the user as they are."""
    raise PydanticCustomError(REFUSED, "{message}", {"message": message, "limit": limit, "remedy": remedy})


_SIZE = {"limit": "such as 200MiB or 8GiB", "remedy": "write a number and its unit: B, KiB, MiB, GiB, KB, MB or GB"}
_TIME = {"limit": "such as 30s, 200ms or 5m", "remedy": "write a number and its unit: ms, s, m, h or d"}


def _read_bytes(value: object) -> int:
    if not isinstance(value, str):
        refuse("is not a size with a unit", **_SIZE)
    try:
        return parse_bytes(value)
    except ValueError:
        refuse("is not a size with a unit", **_SIZE)


def _read_seconds(value: object) -> float:
    if not isinstance(value, str):
        refuse("is not a time with a unit", **_TIME)
    try:
        return parse_seconds(value)
    except ValueError:
        refuse("is not a time with a unit", **_TIME)


def at_least_bytes(minimum_bytes: int) -> AfterValidator:
    """A check that a size is not below ``minimum_bytes``."""

    def check(num_bytes: int) -> int:
        if num_bytes < minimum_bytes:
            limit = f"at least {exact_bytes(minimum_bytes)}"
            refuse("is too small", limit=limit, remedy=f"write {exact_bytes(minimum_bytes)} or more")
        return num_bytes

    return AfterValidator(check)


def _check_positive(seconds: float) -> float:
    if seconds <= 0:
        refuse("is no time at all", limit="more than 0s", remedy="write how long to wait, such as 60s")
    return seconds


_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")


def _check_name(value: object) -> object:
    if not isinstance(value, str) or not value:
        refuse(
            "is not a name", limit="lower-case letters, digits and -", remedy="write a short name such as chat-small"
        )
    if len(value) > MAX_NAME_LENGTH:
        refuse(f"has {len(value)} characters", limit=f"{MAX_NAME_LENGTH} characters", remedy="choose a shorter name")
    if not _NAME.fullmatch(value):
        suggestion = re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-")
        refuse(
            "contains characters that a name may not have",
            limit="lower-case letters, digits and -, not at an end",
            remedy=f"write {suggestion}" if suggestion else "choose another name",
        )
    return value


def _check_sha256(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        refuse(
            "is not a SHA-256 digest",
            limit="64 hexadecimal digits, lower case",
            remedy="paste the output of `sha256sum FILE`, in quotes if it is all digits",
        )
    return value


MAX_NAME_LENGTH = 40

Name = Annotated[
    str,
    BeforeValidator(_check_name, json_schema_input_type=str),
    Field(json_schema_extra={"pattern": f"^{_NAME.pattern}$", "maxLength": MAX_NAME_LENGTH}),
]
"""Part of application, actor and file names: ``[a-z0-9-]``, at most 40 characters."""

Sha256 = Annotated[str, BeforeValidator(_check_sha256, json_schema_input_type=str)]
"""A digest in 64 hexadecimal digits."""

Bytes = Annotated[
    int,
    BeforeValidator(_read_bytes, json_schema_input_type=str),
    PlainSerializer(exact_bytes, return_type=str),
    Field(json_schema_extra={"examples": ["200MiB", "8GiB"]}),
]
"""A size written with its unit (``8GiB``), held as a whole number of bytes."""

Seconds = Annotated[
    float,
    BeforeValidator(_read_seconds, json_schema_input_type=str),
    PlainSerializer(exact_seconds, return_type=str),
    Field(json_schema_extra={"examples": ["30s", "200ms"]}),
]
"""A time written with its unit (``30s``), held in seconds."""

PositiveSeconds = Annotated[Seconds, AfterValidator(_check_positive)]
"""A time that is more than nothing."""


def auto_or_other(value: object) -> str:
    """Which branch of an union of ``auto`` and a number or a list a value belongs to."""
    return "auto" if isinstance(value, str) else "other"


AUTO_OR_OTHER = Discriminator(auto_or_other)
AUTO = Tag("auto")
OTHER = Tag("other")
Auto = Annotated[Literal["auto"], AUTO]
