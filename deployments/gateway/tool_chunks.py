"""Batches of deltas of a request with tools in, bytes of server-sent events out."""

from collections.abc import Iterable
from typing import Literal

import msgspec

from deployments.gateway.answers import (
    ChatChunkChoice,
    ChatDelta,
    FunctionDelta,
    ToolCallDelta,
    Usage,
    chat_logprobs,
)
from deployments.gateway.call_parser import Arguments, CallBegins, Content, Piece
from deployments.gateway.chunks import chunk_head, escape_line_breaks
from deployments.gateway.collect import Identity
from deployments.gateway.merge import Batch
from deployments.gateway.tool_calls import CallingChoice, CallingChoices
from deployments.messages import Delta

_encode = msgspec.json.Encoder().encode


class CallingChunkEncoder:
    """Encodes deltas of a request with tools, as :class:`deployments.gateway.chunks.ChunkEncoder` does without."""

    def __init__(self, identity: Identity, choices: CallingChoices, *, wants_logprobs: bool, usage: bool) -> None:
        self._choices = choices
        self._wants_logprobs = wants_logprobs
        self._begun: set[int] = set()
        self._head = chunk_head("chat", identity) + b'"choices":'
        self._end = b',"usage":null}\n\n' if usage else b"}\n\n"

    def encode(self, batch: Batch) -> bytes:
        """One event for every delta that has something to tell."""
        return b"".join(self._event(delta) for _, delta in batch)

    def usage(self, usage: Usage) -> bytes:
        """The chunk without choices that ends a stream with ``include_usage``."""
        return b"".join((self._head, b'[],"usage":', _encode(usage), b"}\n\n"))

    def _event(self, delta: Delta) -> bytes:
        choice = self._choices[delta.index]
        pieces = choice.take(delta.text, is_last=delta.finish_reason is not None)
        if not pieces and delta.finish_reason is None and not delta.logprobs:
            return b""
        chunk = ChatChunkChoice(
            index=delta.index,
            delta=self._delta(delta.index, pieces, choice),
            logprobs=chat_logprobs(delta.logprobs) if self._wants_logprobs else None,
            finish_reason=choice.finish_reason(delta.finish_reason) if delta.finish_reason is not None else None,
        )
        return b"".join((self._head, escape_line_breaks(_encode([chunk])), self._end))

    def _delta(self, index: int, pieces: Iterable[Piece], choice: CallingChoice) -> ChatDelta:
        content: str | None = None
        calls: dict[int, ToolCallDelta] = {}
        for piece in pieces:
            if isinstance(piece, Content):
                content = (content or "") + piece.text
            else:
                calls[piece.index] = _more_of_call(calls.get(piece.index), piece, choice)
        role: Literal["assistant"] | None = None if index in self._begun else "assistant"
        self._begun.add(index)
        return ChatDelta(content=content, role=role, tool_calls=list(calls.values()) or None)


def _more_of_call(
    so_far: ToolCallDelta | None, piece: CallBegins | Arguments, choice: CallingChoice
) -> ToolCallDelta:
    if isinstance(piece, CallBegins):
        function = FunctionDelta(name=piece.name, arguments="")
        return ToolCallDelta(index=piece.index, id=choice.id_of(piece.index), type="function", function=function)
    if so_far is None:
        return ToolCallDelta(index=piece.index, function=FunctionDelta(arguments=piece.text))
    arguments = so_far.function.arguments + piece.text
    return msgspec.structs.replace(so_far, function=msgspec.structs.replace(so_far.function, arguments=arguments))
