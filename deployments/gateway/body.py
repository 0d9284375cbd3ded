"""Bytes of a request body in, checked JSON values out: size limit, UTF-8, strict JSON, no lone surrogates."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn

from deployments.gateway.errors import ApiError

UPLOAD_STALL_S = 30.0

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


async def read_limited(headers: Mapping[str, str], chunks: AsyncIterator[bytes], max_bytes: int) -> bytes:
    """The whole body; ApiError ``body_too_large`` by its announced length, or as soon as that many bytes arrived.

    ApiError ``client_too_slow`` when nothing comes for ``UPLOAD_STALL_S``.
    """
    announced = headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and (len(announced) > 18 or int(announced) > max_bytes):
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    iterator = aiter(chunks)
    while (chunk := await _next(iterator)) is not None:
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts.append(chunk)
    return b"".join(parts)


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    """The next chunk, None after the last; the client may take its time, but not stop sending."""
    try:
        async with asyncio.timeout(UPLOAD_STALL_S):
            return await anext(chunks, None)
    except TimeoutError as error:
        message = f"No more of the request body came for {UPLOAD_STALL_S:g} s."
        raise ApiError("client_too_slow", message) from error


def _too_large(max_bytes: int) -> ApiError:
    return ApiError("body_too_large", f"The request body exceeds the limit of {max_bytes} bytes.")


def parse_json(raw: bytes) -> Any:
    """The JSON value in ``raw``; ApiError with the position or the key where it is not JSON as RFC 8259 has it.

    Refused beyond what Python's parser refuses: NaN and infinities, duplicate keys, lone surrogates, invalid UTF-8.
    """
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        message = f"The request body is not valid UTF-8: {error.reason} at byte {error.start}."
        raise ApiError("invalid_encoding", message) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno} (character {error.pos})"
        raise ApiError("invalid_json", f"The request body is not valid JSON: {error.msg} at {where}.") from error
    except RecursionError as error:
        raise ApiError("invalid_json", "The request body is nested too deeply.") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ApiError("invalid_json", f"The request body holds a number that is too long: {error}.") from error
    if _SURROGATE_ESCAPE.search(raw):
        _refuse_lone_surrogates(value, "")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError("invalid_json", f"The request body is not valid JSON: {name} is not a JSON number.")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = counts.most_common(1)[0][0]
        name = show(repeated)
        raise ApiError("duplicate_key", f"The request body gives the key {name} twice.", param=printable(repeated))
    return values


def _refuse_lone_surrogates(value: Any, path: str) -> None:
    match value:
        case str():
            _refuse_lone_surrogate(value, path)
        case list():
            for index, item in enumerate(value):
                _refuse_lone_surrogates(item, f"{path}[{index}]")
        case dict():
            for key, item in value.items():
                _refuse_lone_surrogate(key, path)
                _refuse_lone_surrogates(item, f"{path}.{key}" if path else key)


def _refuse_lone_surrogate(text: str, path: str) -> None:
    found = _LONE_SURROGATE.search(text)
    if found:
        message = (
            f"{printable(path) or 'The request body'} holds a lone surrogate (\\u{ord(found[0]):04x}) at character "
            f"{found.start()}, which is not Unicode text; send the whole surrogate pair or leave it out."
        )
        raise ApiError("invalid_unicode", message, param=printable(path) or None)


def printable(text: str, max_chars: int = 80) -> str:
    """``text`` shortened and safe to send back, whatever the client put in it."""
    text = text if len(text) <= max_chars else text[: max_chars - 3] + "..."
    return _LONE_SURROGATE.sub("\ufffd", text)


def show(value: Any) -> str:
    """``value`` as the client wrote it, shortened, for messages."""
    match value:
        case list():
            return f"an array of {len(value)} items"
        case dict():
            return "an object"
        case int() if value.bit_length() > 256:
            return "an integer of more than 77 digits"
    return printable(json.dumps(value, ensure_ascii=False))
