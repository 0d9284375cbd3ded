"""Batches of deltas in, bytes of server-sent events out; the hot path of every token.

All of a chunk's JSON that does not change is encoded once per request. A delta costs one JSON string and one join.
"""

import msgspec

from deployments.gateway.answers import TextOffsets, Usage, chat_logprobs, completion_logprobs
from deployments.gateway.collect import Dialect, Identity
from deployments.gateway.errors import ApiError
from deployments.gateway.merge import Batch
from deployments.messages import ChosenLogprob, Delta

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": waiting\n\n"

_encode = msgspec.json.Encoder().encode

# Line breaks to Python's str.splitlines and so to some clients, though not in the SSE standard.
_LINE_BREAKS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


def encode_text(text: str) -> bytes:
    """``text`` as a JSON string that holds nothing any client could take for the end of a line."""
    encoded = _encode(text)
    return encoded if text.isascii() else escape_line_breaks(encoded)


def escape_line_breaks(encoded: bytes) -> bytes:
    """JSON without anything a client could take for the end of a line."""
    for raw, escaped in _LINE_BREAKS:
        encoded = encoded.replace(raw, escaped)
    return encoded


def error_event(failure: ApiError) -> bytes:
    """``failure`` as the last event of a stream that had already begun."""
    return b"event: error\ndata: " + failure.body() + b"\n\n"


class ChunkEncoder:
    """Encodes the deltas of one request; keeps for every choice its constant bytes and its text offset."""

    def __init__(
        self, dialect: Dialect, identity: Identity, num_choices: int, n: int, *, wants_logprobs: bool, usage: bool
    ) -> None:
        self._chat = dialect == "chat"
        self._n = n
        self._wants_logprobs = wants_logprobs
        self._head = chunk_head(dialect, identity)
        heads = [self._head + b'"choices":[{"index":%d,' % index for index in range(num_choices)]
        first, later = (b'"delta":{"role":"assistant","content":', b'"delta":{"content":')
        if not self._chat:
            first = later = b'"text":'
        self._before_text = [head + first for head in heads]
        self._before_later_text = [head + later for head in heads]
        self._after_text = b"}" if self._chat else b""
        self._end = b'}],"usage":null}\n\n' if usage else b"}]}\n\n"
        self._plain_end = self._after_text + b',"logprobs":null,"finish_reason":null' + self._end
        self._offsets = [TextOffsets() for _ in range(num_choices)]

    def encode(self, batch: Batch) -> bytes:
        """Events of ``batch``; deltas of one choice become one event, a delta without anything to tell none."""
        if len(batch) == 1:
            prompt, delta = batch[0]
            return self._event(prompt * self._n + delta.index, delta)
        by_choice: dict[int, list[Delta]] = {}
        for prompt, delta in batch:
            by_choice.setdefault(prompt * self._n + delta.index, []).append(delta)
        return b"".join(self._event(choice, _joined(deltas)) for choice, deltas in by_choice.items())

    def usage(self, usage: Usage) -> bytes:
        """The chunk without choices that ends a stream with ``include_usage``."""
        return b"".join((self._head, b'"choices":[],"usage":', _encode(usage), b"}\n\n"))

    def _event(self, choice: int, delta: Delta) -> bytes:
        if not delta.text and delta.finish_reason is None and not delta.logprobs:
            return b""
        before = self._before_text[choice]
        self._before_text[choice] = self._before_later_text[choice]
        if delta.finish_reason is None and not self._wants_logprobs:
            return b"".join((before, encode_text(delta.text), self._plain_end))
        parts = (
            before,
            encode_text(delta.text),
            self._after_text,
            b',"logprobs":',
            self._logprobs(choice, delta.logprobs) if self._wants_logprobs else b"null",
            b',"finish_reason":',
            _encode(delta.finish_reason),
            self._end,
        )
        return b"".join(parts)

    def _logprobs(self, choice: int, entries: tuple[ChosenLogprob, ...]) -> bytes:
        if self._chat:
            return _encode(chat_logprobs(entries))
        return _encode(completion_logprobs(entries, self._offsets[choice]))


def chunk_head(dialect: Dialect, identity: Identity) -> bytes:
    """The beginning of every event of one request, up to its choices."""
    fields = {
        "id": identity.id,
        "object": "chat.completion.chunk" if dialect == "chat" else "text_completion",
        "created": identity.created,
        "model": identity.model,
        "system_fingerprint": identity.system_fingerprint,
    }
    return b"data: " + _encode(fields)[:-1] + b","


def _joined(deltas: list[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        request_id=deltas[0].request_id,
        index=deltas[0].index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )
