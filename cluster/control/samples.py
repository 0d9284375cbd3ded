"""The first words with a fresh cluster: the plan and a gateway in, each model's answer and what to do next out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from cluster.config.nodes import ExistingProvider
from cluster.config.schema import ClusterConfig
from cluster.control.ask import Gateway
from cluster.errors import ControlError
from cluster.plan.types import ModelPlan, Plan

QUESTION = "What is the capital of France? Answer in one short sentence."
SENTENCE = "The quick brown fox jumps over the lazy dog."
BEGINNING = "The capital of France is"
_ANSWER_TOKENS = 48
_SETTLE_S = 30.0
_RETRY_S = 0.5
_ANY_HOST = ("0.0.0.0", "::")  # noqa: S104 (compared with, not bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one model made of the sample: an answer to a question, the rest of a sentence, a vector or labels."""

    model: str
    question: str
    text: str


def base_url(config: ClusterConfig) -> str:
    """``http://HOST:PORT`` at which this machine reaches the gateway."""
    host, port = config.gateway.http.host, config.gateway.http.port
    if host in _ANY_HOST:
        provider = config.cluster.provider
        outside = urlsplit(provider.dashboard).hostname if isinstance(provider, ExistingProvider) else None
        host = outside or "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def first_answers(gateway: Gateway, models: Sequence[ModelPlan], say: Callable[[str], None]) -> tuple[Answer, ...]:
    """Ask every model one question over HTTP; ControlError when one does not answer within half a minute."""
    say("Asking each model a first question.")
    return tuple(_ask_until_settled(gateway, model) for model in models)


def _ask_until_settled(gateway: Gateway, model: ModelPlan) -> Answer:
    """The gateway learns of new routes a moment after Serve calls it running."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        try:
            return _ask(gateway, model)
        except ControlError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_S)


def _ask(gateway: Gateway, model: ModelPlan) -> Answer:
    if model.task == "embed":
        vector = gateway.embed(model.name, SENTENCE)
        first = ", ".join(f"{value:.3f}" for value in vector[:3])
        return Answer(model=model.name, question=SENTENCE, text=f"[{first}, ...] ({len(vector)} numbers)")
    if model.task == "classify":
        found = list(gateway.classify(model.name, SENTENCE).items())[:3]
        text = ", ".join(f"{label} {probability:.0%}" for label, probability in found)
        return Answer(model=model.name, question=SENTENCE, text=text)
    if not model.chats:
        text = gateway.complete(model.name, BEGINNING, max_tokens=_ANSWER_TOKENS)
        return Answer(model=model.name, question=BEGINNING, text=text.strip())
    text = gateway.chat(model.name, [{"role": "user", "content": QUESTION}], max_tokens=_ANSWER_TOKENS)
    return Answer(model=model.name, question=QUESTION, text=text.strip())


def next_steps(
    config: ClusterConfig,
    plan: Plan,
    dashboard_url: str,
    answers: Sequence[Answer],
    config_path: str,
    command: str = "manta",
) -> str:
    """What a person wants after ``up``: the URLs, lines to copy, and the models' own words.

    ``command`` is what this person's shell finds ``manta`` by.
    """
    url = base_url(config)
    lines = [""]
    for answer in answers:
        lines += [f"{answer.model} was asked: {answer.question}", f"{answer.model} answered:  {answer.text}", ""]
    lines += [f"Base URL    {url}/v1", f"Dashboard   {dashboard_url}", f"Stop        {command} down {config_path}"]
    for model in plan.models:
        lines += ["", *_try_lines(url, model, f"{command} chat {model.name} --config {config_path}")]
    return "\n".join(lines)


def _try_lines(url: str, model: ModelPlan, chat: str) -> list[str]:
    if model.task != "generate":
        body = f'{{"model": "{model.name}", "input": "Hello"}}'
        return [_curl(f"{url}/v1/{'embeddings' if model.task == 'embed' else 'classify'}", body)]
    if not model.chats:
        body = f'{{"model": "{model.name}", "prompt": "{BEGINNING}", "max_tokens": {_ANSWER_TOKENS}}}'
        return [_curl(f"{url}/v1/completions", body)]
    body = f'{{"model": "{model.name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return [chat, _curl(f"{url}/v1/chat/completions", body)]


def _curl(url: str, body: str) -> str:
    return f"curl {url} -H 'Content-Type: application/json' -d '{body}'"
