"""Deltas of all choices in, one whole answer out."""

from dataclasses import dataclass, field
from typing import Literal

from deployments.gateway.answers import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    TextOffsets,
    Usage,
    chat_logprobs,
    completion_logprobs,
)
from deployments.gateway.errors import ApiError
from deployments.gateway.merge import Batch
from deployments.gateway.tool_calls import CallingChoices, assistant_message
from deployments.messages import ChosenLogprob, FinishReason

Dialect = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What every answer and every chunk of it says about itself; ``created`` is Unix time in seconds."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    logprobs: list[ChosenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Collector:
    """Memory is bounded by what may be generated: ``num_choices`` times the model's context."""

    def __init__(self, num_choices: int, n: int, wants_logprobs: bool) -> None:
        self._choices = [_Choice() for _ in range(num_choices)]
        self._n = n
        self._wants_logprobs = wants_logprobs

    def add(self, batch: Batch) -> None:
        """Append deltas to their choices."""
        for prompt, delta in batch:
            choice = self._choices[prompt * self._n + delta.index]
            choice.texts.append(delta.text)
            choice.logprobs.extend(delta.logprobs)
            choice.finish_reason = delta.finish_reason or choice.finish_reason

    def chat(self, identity: Identity, usage: Usage, calling: CallingChoices | None = None) -> ChatCompletion:
        """All of it as a chat completion; ``calling`` finds the calls, where tools may be called."""
        choices = [self._chat_choice(index, choice, calling) for index, choice in enumerate(self._choices)]
        return ChatCompletion(
            id=identity.id,
            object="chat.completion",
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.system_fingerprint,
            choices=choices,
            usage=usage,
        )

    def _chat_choice(self, index: int, choice: _Choice, calling: CallingChoices | None) -> ChatChoice:
        text, reason = "".join(choice.texts), _finish_reason(choice)
        logprobs = chat_logprobs(choice.logprobs) if self._wants_logprobs else None
        if calling is None:
            message = AssistantMessage(role="assistant", content=text)
            return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=reason)
        message = assistant_message(text, calling[index])
        return ChatChoice(
            index=index, message=message, logprobs=logprobs, finish_reason=calling[index].finish_reason(reason)
        )

    def completion(self, identity: Identity, usage: Usage) -> Completion:
        """All of it as a text completion."""
        choices = [
            CompletionChoice(
                index=index,
                text="".join(choice.texts),
                logprobs=completion_logprobs(choice.logprobs, TextOffsets()) if self._wants_logprobs else None,
                finish_reason=_finish_reason(choice),
            )
            for index, choice in enumerate(self._choices)
        ]
        return Completion(
            id=identity.id,
            object="text_completion",
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.system_fingerprint,
            choices=choices,
            usage=usage,
        )


def _finish_reason(choice: _Choice) -> FinishReason:
    if choice.finish_reason is None:
        raise ApiError("internal", "The model's answer stopped before every choice had ended.")
    return choice.finish_reason
