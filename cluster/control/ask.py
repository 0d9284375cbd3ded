"""Talking to a running gateway over HTTP, as any client would: a question in, the model's words or its error out."""

import json
from collections.abc import Generator
from typing import Any
from urllib.parse import urlsplit

import requests

from cluster.errors import ControlError

_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 120.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

ChatMessage = dict[str, str]

CHAT_TEMPERATURE = 0.3
"""Small models ramble at OpenAI's default of 1."""


class Gateway:
    """A client of one gateway; ``url`` is its base, such as ``http://127.0.0.1:8000``."""

    def __init__(
        self, url: str, *, temperature: float = CHAT_TEMPERATURE, max_answer_tokens: int | None = None
    ) -> None:
        """``temperature`` and ``max_answer_tokens`` (None: the context) are those of :meth:`stream_chat`."""
        self._chat_params: dict[str, float | int] = {"temperature": temperature}
        if max_answer_tokens is not None:
            self._chat_params["max_tokens"] = max_answer_tokens
        self.url = url.rstrip("/").removesuffix("/v1")
        self._session = requests.Session()
        if urlsplit(self.url).hostname in _LOOPBACK:
            self._session.trust_env = False  # a proxy configured in the environment cannot reach this machine

    def close(self) -> None:
        """Close idle connections; the client may be used again."""
        self._session.close()

    def chat(self, model: str, messages: list[ChatMessage], *, max_tokens: int) -> str:
        """The whole answer to ``messages``, chosen greedily."""
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        answer = self._post("/v1/chat/completions", body).json()
        return str(answer["choices"][0]["message"]["content"])

    def complete(self, model: str, prompt: str, *, max_tokens: int) -> str:
        """What the model writes after ``prompt``, chosen greedily; for models without a chat template."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return str(self._post("/v1/completions", body).json()["choices"][0]["text"])

    def stream_chat(self, model: str, messages: list[ChatMessage]) -> Generator[str, None, None]:
        """Pieces of the answer as they come; closing the iterator cancels the request."""
        body = {"model": model, "messages": messages, "stream": True, **self._chat_params}
        with self._post("/v1/chat/completions", body, stream=True) as response:
            response.encoding = "utf-8"
            try:
                for line in response.iter_lines():
                    piece = _piece(line)
                    if piece:
                        yield piece
            except requests.RequestException as error:
                raise ControlError(f"{self.url} ended the answer early: {error}") from error

    def embed(self, model: str, text: str) -> list[float]:
        """The vector of ``text``."""
        answer = self._post("/v1/embeddings", {"model": model, "input": text}).json()
        return list(answer["data"][0]["embedding"])

    def classify(self, model: str, text: str) -> dict[str, float]:
        """The probability of each label of ``text``, the most likely first."""
        answer = self._post("/v1/classify", {"model": model, "input": text}).json()
        found = zip(answer["labels"], answer["data"][0]["probs"], strict=True)
        return dict(sorted(found, key=lambda pair: -pair[1]))

    def _post(self, path: str, body: dict[str, Any], *, stream: bool = False) -> requests.Response:
        try:
            response = self._session.post(
                f"{self.url}{path}", json=body, stream=stream, timeout=(_CONNECT_TIMEOUT_S, _ANSWER_TIMEOUT_S)
            )
        except requests.Timeout as error:
            raise ControlError(f"{self.url} did not answer within {_ANSWER_TIMEOUT_S:g} s") from error
        except requests.RequestException as error:
            raise ControlError(f"nothing answers at {self.url}; is it up? See `manta status`") from error
        if not response.ok:
            raise ControlError(f"{self.url} answered {response.status_code}: {_error_message(response)}")
        return response


def _piece(line: bytes) -> str | None:
    """Text of one line of a server-sent event stream; ControlError for an error event."""
    if not line.startswith(b"data:"):
        return None
    data = line.removeprefix(b"data:").strip()
    if data == b"[DONE]":
        return None
    event = json.loads(data)
    if "error" in event:
        raise ControlError(str(event["error"].get("message", event["error"])))
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def _error_message(response: requests.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text.strip()[:500]
