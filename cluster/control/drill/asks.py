"""What a drill asks: a model's context length in, requests of every kind that can be repeated word for word out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["chat", "seeded", "choices", "logprobs", "json", "whole"]

KINDS: tuple[Kind, ...] = ("chat", "seeded", "choices", "logprobs", "json", "whole")

_MAX_OUTPUT_TOKENS = 64
_MAX_PROMPT_CHARS = 200
_CONTEXT_SHARE = 4
"""Prompt and answer each take at most this part of the context, also where every character is a token."""
_NUM_CHOICES = 3

_TOPICS = (
    "Describe how a river becomes a delta, from the mountains down to the sea.",
    "A keeper writes a letter about the storm of last night and the ships it held in the harbour.",
    "List what a baker does between three in the morning and the first customer.",
    "Explain to a child why the moon follows the car and never comes closer.",
    "The museum reopens on Monday with a hall about clocks. What would you look at first?",
    "Two gardeners argue about whether to cut the old pear tree; write down what each of them says.",
    "Tell the story of a train that stops at a station which is on no map.",
    "How would you pack for a walk of five days along a coast where it rains every afternoon?",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request. ``num_tokens`` must come back, all choices together; None where the model may end earlier."""

    kind: Kind
    path: str
    body: Mapping[str, Any]
    num_choices: int = 1
    num_tokens: int | None

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""
        return bool(self.body.get("stream"))

    @property
    def wants_logprobs(self) -> bool:
        """Whether every token comes with its log-probability."""
        return "logprobs" in self.body


def make_asks(model: str, context_tokens: int, count: int, seed: int) -> tuple[Ask, ...]:
    """``count`` different requests to ``model``, kinds taking turns; the same arguments give the same requests."""
    return tuple(_ask(KINDS[number % len(KINDS)], model, context_tokens, number, seed) for number in range(count))


def short_ask(model: str, number: int, num_tokens: int) -> Ask:
    """A small request that streams exactly ``num_tokens`` tokens; for measuring how many can be answered."""
    body = _common(model, number, num_tokens) | {"prompt": _TOPICS[number % len(_TOPICS)][:24], "ignore_eos": True}
    return Ask(kind="seeded", path="/v1/completions", body=body | _STREAM, num_tokens=num_tokens)


_STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def _ask(kind: Kind, model: str, context_tokens: int, number: int, seed: int) -> Ask:
    limit = max(1, min(_MAX_OUTPUT_TOKENS, context_tokens // _CONTEXT_SHARE))
    num_tokens = max(1, limit - (number * 7) % max(1, limit // 2))
    prompt = _prompt(number, min(_MAX_PROMPT_CHARS, context_tokens // _CONTEXT_SHARE))
    body = _common(model, seed * 1000 + number, num_tokens) | {"ignore_eos": True}
    chat = {"messages": [{"role": "user", "content": prompt}]}
    match kind:
        case "chat":
            return _streamed(kind, body | chat | {"temperature": 0}, num_tokens)
        case "seeded":
            return _streamed(kind, body | {"prompt": prompt, "temperature": 1.0}, num_tokens)
        case "choices":
            several = {"prompt": prompt, "temperature": 0.8, "n": _NUM_CHOICES}
            return _streamed(kind, body | several, num_tokens * _NUM_CHOICES, _NUM_CHOICES)
        case "logprobs":
            return _streamed(kind, body | {"prompt": prompt, "temperature": 0, "logprobs": 2}, num_tokens)
        case "json":
            del body["ignore_eos"]
            shaped = chat | {"temperature": 0.7, "response_format": {"type": "json_object"}}
            return _streamed(kind, body | shaped, None)
        case "whole":
            whole = body | chat | {"temperature": 1.0}
            return Ask(kind=kind, path="/v1/chat/completions", body=whole, num_tokens=num_tokens)


def _streamed(kind: Kind, body: Mapping[str, Any], num_tokens: int | None, num_choices: int = 1) -> Ask:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return Ask(kind=kind, path=path, body={**body, **_STREAM}, num_choices=num_choices, num_tokens=num_tokens)


def _common(model: str, seed: int, num_tokens: int) -> dict[str, Any]:
    return {"model": model, "seed": seed, "max_tokens": num_tokens}


def _prompt(number: int, num_chars: int) -> str:
    """Some prompts share their beginning and some do not, so that prefixes are found in the cache, or not."""
    topic = _TOPICS[number // 2 % len(_TOPICS)]
    return f"{topic} ({number})"[-num_chars:] if number % 2 else f"{topic} {number}."[:num_chars]
