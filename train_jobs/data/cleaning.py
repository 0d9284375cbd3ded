"""Raw fields of a row enter, a checked and cleaned example of the task leaves, or why it is none."""

import unicodedata
from dataclasses import dataclass
from typing import Any

from cluster.config.jobs_train import JobTask
from train_jobs.data.spec import CleanSpec

_FOREIGN_ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of data that names its turns ``from`` and ``value``."""


class Malformed(ValueError):
    """A row that cannot be used; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One document of any task; the fields that the task does not have are empty."""

    text: str = ""
    label: str | None = None
    messages: tuple[Message, ...] = ()
    """The conversation (sft), or the prompt (dpo)."""
    chosen: str = ""
    rejected: str = ""

    @property
    def num_chars(self) -> int:
        """Length of the document's own text."""
        turns = sum(len(message.content) for message in self.messages)
        return len(self.text) + turns + len(self.chosen) + len(self.rejected)

    @property
    def identity(self) -> tuple[str, ...]:
        """What makes two documents the same; the label does not."""
        turns = (part for message in self.messages for part in (message.role, message.content))
        return (self.text, *turns, self.chosen, self.rejected)

    @property
    def split_identity(self) -> tuple[str, ...]:
        """What decides the split: the text, or all up to the first user turn, so that no prompt is in both splits."""
        if not self.messages:
            return (self.text,)
        first = next((index for index, message in enumerate(self.messages) if message.role == "user"), 0)
        return tuple(message.content for message in self.messages[: first + 1])


def clean_text(text: str, spec: CleanSpec) -> str:
    """``text`` with line feeds for all line ends, in the wanted Unicode form, without white space at its ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if spec.normalize is not None and not text.isascii():
        text = unicodedata.normalize(spec.normalize, text)
    return text.strip()


def make_example(task: JobTask, values: dict[str, Any], spec: CleanSpec, labels: frozenset[str] | None) -> Example:
    """The row's example; Malformed for a wrong type, a role that is none, or a label that is not in ``labels``."""
    if task == "lm":
        return Example(text=_text(values, "text", spec))
    if task == "classify":
        return Example(text=_text(values, "text", spec), label=_label(values["label"], labels))
    if task == "sft":
        messages = _messages(values["messages"], "messages", spec)
        if not any(message.role == "assistant" for message in messages):
            raise Malformed("no turn of the assistant, so nothing to learn")
        return Example(messages=messages)
    prompt = values["prompt"]
    turns = (
        (Message(role="user", content=_text(values, "prompt", spec)),)
        if isinstance(prompt, str)
        else _messages(prompt, "prompt", spec)
    )
    chosen, rejected = (_answer(values, side, spec) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise Malformed("chosen and rejected are the same")
    return Example(messages=turns, chosen=chosen, rejected=rejected)


def _text(values: dict[str, Any], field: str, spec: CleanSpec) -> str:
    value = values[field]
    if not isinstance(value, str):
        raise Malformed(f"{field} is {type(value).__name__}, not text")
    return _checked(clean_text(value, spec), field)


def _checked(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"{field} has a lone surrogate U+{ord(text[error.start]):04X}") from error
    return text


def _label(value: Any, labels: frozenset[str] | None) -> str:
    if not isinstance(value, str | int) or value == "":
        raise Malformed(f"label is {value!r}, not text or a whole number")
    label = _checked(str(value).strip(), "label")
    if labels is not None and label not in labels:
        raise Malformed(f"label {label!r} is not one of {', '.join(sorted(labels))}")
    return label


def _messages(value: Any, field: str, spec: CleanSpec) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise Malformed(f"{field} is {type(value).__name__}, not a list of messages")
    return tuple(_message(turn, field, spec) for turn in value)


def _message(turn: Any, field: str, spec: CleanSpec) -> Message:
    if isinstance(turn, dict) and "from" in turn:
        turn = {"role": _FOREIGN_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise Malformed(f"{field}: a message needs `role` and `content`, not {str(turn)[:80]}")
    if turn["role"] not in ("system", "user", "assistant"):
        raise Malformed(f"{field}: role {turn['role']!r} is none of system, user, assistant")
    return Message(
        role=turn["role"], content=_text(turn, "content", spec) if "content" in turn else _no_content(field)
    )


def _no_content(field: str) -> str:
    raise Malformed(f"{field}: a message has no `content`")


def _answer(values: dict[str, Any], side: str, spec: CleanSpec) -> str:
    """The answer as text; data that repeats the conversation in it has the answer as its last message."""
    if isinstance(values[side], str):
        return _text(values, side, spec)
    messages = _messages(values[side], side, spec)
    if messages[-1].role != "assistant":
        raise Malformed(f"{side}: the last message is not the assistant's")
    return messages[-1].content
