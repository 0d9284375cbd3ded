"""Text of choices that may call tools enters; their content and calls leave, with the ids that the client sees."""

import secrets
import string
from collections.abc import Callable

from deployments.gateway.answers import AnswerFinishReason, AssistantMessage, Function, ToolCall
from deployments.gateway.call_parser import Arguments, CallBegins, CallParser, Content, Piece
from deployments.gateway.errors import ApiError
from deployments.messages import FinishReason, ToolFormat


class CallingChoice:
    """One choice: its parser, and the ids of its calls."""

    def __init__(self, tool_format: ToolFormat, names: frozenset[str]) -> None:
        self._parser = CallParser(tool_format, names)
        self._format = tool_format
        self._ids: list[str] = []

    def take(self, text: str, *, is_last: bool) -> list[Piece]:
        """What is certain with more text; ``is_last``: nothing more comes."""
        pieces = self._parser.feed(text)
        return pieces + self._parser.finish() if is_last else pieces

    def id_of(self, index: int) -> str:
        """Id of the ``index``-th call."""
        while len(self._ids) <= index:
            self._ids.append(_new_id(self._format))
        return self._ids[index]

    def finish_reason(self, reason: FinishReason) -> AnswerFinishReason:
        """``stop`` after a call means that the call is to be done."""
        return "tool_calls" if reason == "stop" and self._parser.num_calls else reason


def _new_id(tool_format: ToolFormat) -> str:
    if tool_format == "mistral":  # its templates refuse any other length
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


class CallingChoices:
    """All choices of one request; ``tool_format`` is asked when the first text has come, and known by then."""

    def __init__(self, tool_format: Callable[[], ToolFormat | None], names: frozenset[str]) -> None:
        self._tool_format = tool_format
        self._names = names
        self._choices: dict[int, CallingChoice] = {}

    def __getitem__(self, index: int) -> CallingChoice:
        """The choice of that index."""
        if index not in self._choices:
            tool_format = self._tool_format()
            if tool_format is None:
                raise ApiError("internal", "The model did not say how it writes calls of tools; this is a bug.")
            self._choices[index] = CallingChoice(tool_format, self._names)
        return self._choices[index]


def assistant_message(text: str, choice: CallingChoice) -> AssistantMessage:
    """The whole text of a choice as a message."""
    content = ""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for piece in choice.take(text, is_last=True):
        match piece:
            case Content():
                content += piece.text
            case CallBegins():
                names[piece.index], arguments[piece.index] = piece.name, ""
            case Arguments():
                arguments[piece.index] += piece.text
    calls = [
        ToolCall(id=choice.id_of(index), type="function", function=Function(name=name, arguments=arguments[index]))
        for index, name in names.items()
    ]
    if not calls:
        return AssistantMessage(role="assistant", content=content)
    return AssistantMessage(role="assistant", content=content or None, tool_calls=calls)
