"""One request as its client saw it: pieces of the response and their times in; what came, when, and its end out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.control.drill.asks import Ask

End = Literal["done", "refused", "error", "broken", "unended"]
"""An answer; an explicit error instead of it (``refused``) or in its middle; a broken connection; no end at all."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What one request got. Times are of one monotonic clock, seconds; lists have one entry per choice."""

    ask: Ask
    number: int
    """Which ask of the pool it is: equal numbers must give equal answers."""
    sent_at: float
    token_times: list[float] = field(default_factory=list)
    """When each event with tokens arrived; empty where the answer came in one piece."""
    texts: list[str] = field(default_factory=list)
    finish_reasons: list[str | None] = field(default_factory=list)
    logprob_tokens: list[list[str]] = field(default_factory=list)
    num_tokens: int | None = None
    """Completion tokens as the server counted them."""
    end: End | None = None
    """None while it is under way."""
    ended_at: float | None = None
    status: int | None = None
    error: str = ""
    retry_after_s: float | None = None
    violations: list[str] = field(default_factory=list)
    """What no server may send: a second end, text after the end of a choice, a wrong count."""

    @property
    def answer(self) -> tuple[object, ...]:
        """What must be equal in every repetition."""
        return self.texts, self.finish_reasons, self.logprob_tokens, self.num_tokens

    def finish(self, end: End, at: float, error: str = "") -> None:
        """Set the end; a later one is a violation."""
        if self.end is not None:
            self.violations.append(f"a second end ({end}) after {self.end}")
            return
        self.end, self.ended_at, self.error = end, at, error


class ResponseReader:
    """Fills one Outcome from a response's body."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        outcome.texts = [""] * outcome.ask.num_choices
        outcome.finish_reasons = [None] * outcome.ask.num_choices
        outcome.logprob_tokens = [[] for _ in range(outcome.ask.num_choices)]

    def refused(self, status: int, body: bytes, retry_after: str | None, at: float) -> None:
        """An error status instead of an answer."""
        self._outcome.status = status
        self._outcome.retry_after_s = _number(retry_after)
        self._outcome.finish("refused", at, f"{status}: {_error_message(body)}")

    def whole(self, body: bytes, at: float) -> None:
        """An answer in one piece."""
        try:
            self._take(json.loads(body))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            self._outcome.violations.append(f"an answer that cannot be read: {error!r}")
        self._done(at)

    def line(self, line: bytes, at: float) -> None:
        """One line of a server-sent event stream."""
        if not line.startswith(b"data:"):
            return
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            self._done(at)
            return
        if self._outcome.end is not None:
            self._outcome.violations.append(f"an event after the end: {data[:80]!r}")
            return
        try:
            self._take_event(json.loads(data), at)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            self._outcome.violations.append(f"an event that cannot be read ({error!r}): {data[:80]!r}")

    def _take_event(self, event: Mapping[str, Any], at: float) -> None:
        if "error" in event:
            self._outcome.finish("error", at, str(event["error"].get("message", event["error"])))
        elif self._take(event):
            self._outcome.token_times.append(at)

    def _take(self, event: Mapping[str, Any]) -> bool:
        """Add what the event brings; whether tokens were in it."""
        usage = event.get("usage")
        if usage is not None:
            self._outcome.num_tokens = int(usage["completion_tokens"])
        brought = [self._take_choice(choice) for choice in event["choices"]]
        return any(brought)

    def _take_choice(self, choice: Mapping[str, Any]) -> bool:
        outcome, index = self._outcome, int(choice["index"])
        piece = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        text, tokens = piece.get("content") or "", _logprob_tokens(choice.get("logprobs"))
        if outcome.finish_reasons[index] is not None:
            outcome.violations.append(f"choice {index} goes on after its end: {text[:40]!r}")
        outcome.texts[index] += text
        outcome.logprob_tokens[index] += tokens
        outcome.finish_reasons[index] = choice.get("finish_reason")
        return bool(text or tokens)

    def _done(self, at: float) -> None:
        outcome = self._outcome
        outcome.finish("done", at)
        unfinished = [index for index, reason in enumerate(outcome.finish_reasons) if reason is None]
        if unfinished:
            outcome.violations.append(f"choices {unfinished} have no finish reason")
        expected, counted = outcome.ask.num_tokens, outcome.num_tokens
        if counted is None or (expected is not None and counted != expected):
            outcome.violations.append(f"the server counted {counted} tokens, {expected} were asked for")
        listed = sum(map(len, outcome.logprob_tokens))
        if outcome.ask.wants_logprobs and listed != counted:
            outcome.violations.append(f"{listed} tokens came, the server counted {counted}")


def _logprob_tokens(logprobs: Mapping[str, Any] | None) -> list[str]:
    if logprobs is None:
        return []
    if "tokens" in logprobs:
        return list(logprobs["tokens"])
    return [entry["token"] for entry in logprobs.get("content") or ()]


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _error_message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()[:200]
