"""A deterministic engine behind the gateway's ``Backend`` protocol: one token a character, no model, no process.

The text of a choice depends on (prompt, seed, choice) alone. Attributes make it slow, full, broken or strict, so
that a test can put the gateway into any situation by name.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Iterator

import numpy as np
from numpy.typing import NDArray

from cluster.plan.types import GatewaySettings, Route, RouteTarget, RoutingTable, Task
from deployments.gateway.backend import Event, Health, ModelHealth
from deployments.messages import (
    ChatPrompt,
    ChosenLogprob,
    Classified,
    Classify,
    Delta,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    Finished,
    FinishReason,
    Generate,
    Prompt,
    Refused,
    RequestRefused,
    SamplingParams,
    Started,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenLogprob,
    ToolFormat,
)

ALPHABET = "abcdefgh éß✓😀,.\n\u2028"
END_AFTER = 24
DIMENSIONS = 8
LABELS = ("ham", "spam", "eggs")
CONTEXT_TOKENS = 512

SETTINGS = GatewaySettings(
    max_body_bytes=256 * 1024,
    max_streams=8,
    request_timeout_s=30.0,
    max_choices=8,
    max_stop_strings=16,
    max_logprobs=5,
)


def route(model: str, task: Task = "generate") -> Route:
    """A route of one application, ``<model>-v1``."""
    targets = (RouteTarget(app=f"{model}-v1", version="v1"),)
    return Route(model=model, task=task, context_tokens=CONTEXT_TOKENS, created=1_700_000_000, targets=targets)


class FakeBackend:
    """Serves ``writer`` (generate), ``embedder`` (embed) and ``sorter`` (classify)."""

    def __init__(self, settings: GatewaySettings = SETTINGS) -> None:
        routes = (route("writer"), route("embedder", "embed"), route("sorter", "classify"))
        self.table = RoutingTable(settings=settings, routes=routes)
        self.requests: list[Generate | Embed | Classify | Tokenize | Detokenize] = []
        self.num_open = 0
        self.cancelled: list[str] = []
        self.changed = asyncio.Condition()
        self.refuse: Refused | None = None
        self.fail_after: int | None = None
        self.failure: Exception = RequestRefused(Refused(request_id="", code="internal", message="stage 1 is lost"))
        self.pause_after: int | None = None
        self.resume = asyncio.Event()
        self.in_one_go = False
        self.stop_early = False
        self.status = "ok"
        self.says: str | None = None
        """What every choice says, instead of random characters."""
        self.tool_format: ToolFormat = "hermes"

    def replace_settings(self, **changes: float) -> None:
        """Put a new routing table in force."""
        self.table = self.table.model_copy(update={"settings": self.table.settings.model_copy(update=changes)})

    def find(self, model: str) -> Route | None:
        """The route of ``model``."""
        return next((route for route in self.table.routes if route.model == model), None)

    def health(self) -> Health:
        """As ``status`` says."""
        models = tuple(self._model_health(route) for route in self.table.routes)
        return Health(status=self.status, models=models)  # type: ignore[arg-type]

    def _model_health(self, route: Route) -> ModelHealth:
        return ModelHealth(
            model=route.model,
            task=route.task,
            num_replicas=1,
            num_running=self.num_open,
            num_waiting=0,
            kv_used_fraction=0.5 if self.num_open else 0.0,
        )

    async def wait_for(self, what: object) -> None:
        """Until ``what()`` is true; checked at every opened and closed request."""
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(what)  # type: ignore[arg-type]

    async def _note(self, change: int) -> None:
        async with self.changed:
            self.num_open += change
            self.changed.notify_all()

    async def generate(self, model: str, request: Generate) -> AsyncGenerator[Event]:
        """Started, one delta a token with choices taking turns, Finished."""
        self.requests.append(request)
        num_prompt_tokens = len(prompt_text(request.prompt))
        self._check(request, num_prompt_tokens)
        ended = False
        await self._note(1)
        try:
            seed = request.sampling.seed if request.sampling.seed is not None else 7
            yield Started(
                request_id=request.request_id,
                num_prompt_tokens=num_prompt_tokens,
                num_cached_tokens=2,
                seed=seed,
                tool_format=self.tool_format if request.tools is not None else None,
            )
            num_tokens = 0
            for delta in deltas(request, seed, self.says):
                if num_tokens == self.pause_after:
                    await self.resume.wait()
                if num_tokens == self.fail_after:
                    raise self.failure
                if not self.in_one_go:
                    await asyncio.sleep(0)
                num_tokens += len(delta.token_ids)
                yield delta
            ended = True
            if not self.stop_early:
                yield Finished(
                    request_id=request.request_id,
                    num_prompt_tokens=num_prompt_tokens,
                    num_cached_tokens=2,
                    num_completion_tokens=num_tokens,
                )
        finally:
            if not ended:
                self.cancelled.append(request.request_id)
            await self._note(-1)

    def _check(self, request: Generate, num_prompt_tokens: int) -> None:
        if self.refuse is not None:
            raise RequestRefused(self.refuse)
        asked = num_prompt_tokens + (request.max_tokens or 1)
        if asked > CONTEXT_TOKENS:
            message = f"prompt and answer need {asked} tokens, the context holds {CONTEXT_TOKENS}"
            raise RequestRefused(
                Refused(request_id=request.request_id, code="context_length_exceeded", message=message)
            )

    async def embed(self, model: str, request: Embed) -> tuple[Embedded, NDArray[np.float32]]:
        """Vectors from a digest of each input."""
        self.requests.append(request)
        if self.refuse is not None:
            raise RequestRefused(self.refuse)
        await self._note(1)
        try:
            if self.pause_after is not None:
                await self.resume.wait()
        finally:
            await self._note(-1)
        vectors = np.stack([_vector(item) for item in request.inputs])
        num_tokens = sum(len(item) for item in request.inputs)
        embedded = Embedded(
            request_id=request.request_id,
            num_vectors=len(vectors),
            dimensions=DIMENSIONS,
            num_prompt_tokens=num_tokens,
        )
        return embedded, vectors

    async def classify(self, model: str, request: Classify) -> tuple[Classified, NDArray[np.float32]]:
        """Probabilities from the length of each input: all on the label of that number, counted round."""
        self.requests.append(request)
        if self.refuse is not None:
            raise RequestRefused(self.refuse)
        classified = Classified(
            request_id=request.request_id,
            labels=LABELS,
            num_inputs=len(request.inputs),
            num_prompt_tokens=sum(len(item) for item in request.inputs),
        )
        return classified, np.eye(len(LABELS), dtype=np.float32)[[len(item) % len(LABELS) for item in request.inputs]]

    async def tokenize(self, model: str, request: Tokenize) -> Tokenized:
        """Code points."""
        self.requests.append(request)
        text = prompt_text(request.prompt)
        return Tokenized(
            request_id=request.request_id,
            token_ids=tuple(map(ord, text)),
            token_texts=tuple(text),
            context_tokens=CONTEXT_TOKENS,
        )

    async def detokenize(self, model: str, request: Detokenize) -> Detokenized:
        """Characters of code points; ``invalid_request`` for what is none."""
        self.requests.append(request)
        for token in request.token_ids:
            if token > 0x10FFFF or 0xD800 <= token < 0xE000:
                refused = Refused(
                    request_id=request.request_id,
                    code="invalid_request",
                    message=f"token {token} is not in the vocabulary",
                    param="tokens",
                )
                raise RequestRefused(refused)
        return Detokenized(request_id=request.request_id, text="".join(map(chr, request.token_ids)))


def prompt_text(prompt: Prompt) -> str:
    """What the fake engine continues: a text, a rendered conversation, or characters of token ids."""
    if isinstance(prompt, TextPrompt):
        return prompt.text
    if isinstance(prompt, ChatPrompt):
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in prompt.messages)
    return "".join(chr(token % 0xD800) for token in prompt.token_ids)


def expected_text(prompt: str, seed: int, choice: int, num_tokens: int) -> str:
    """The first ``num_tokens`` characters of a choice."""
    return "".join(_character(prompt, seed, choice, position) for position in range(num_tokens))


def deltas(request: Generate, seed: int, says: str | None = None) -> Iterator[Delta]:
    """All choices in turn, one token each, until every one has ended."""
    choices = [_choice(request, seed, index, says) for index in range(request.sampling.n)]
    while choices:
        for choice in tuple(choices):
            delta = next(choice, None)
            if delta is None:
                choices.remove(choice)
            else:
                yield delta


def _choice(request: Generate, seed: int, index: int, says: str | None) -> Iterator[Delta]:
    sampling = request.sampling
    end_after = END_AFTER if says is None else len(says)
    limit = request.max_tokens if request.max_tokens is not None else end_after
    text = ""
    for position in range(limit):
        character = says[position] if says else _character(prompt_text(request.prompt), seed, index, position)
        text += character
        reason, hit = _end(text, position + 1, limit, end_after, sampling)
        cut = hit is not None and not sampling.include_stop_str_in_output
        yield Delta(
            request_id=request.request_id,
            index=index,
            text="" if cut else character,
            token_ids=(ord(character),),
            logprobs=_logprobs(character, sampling.logprobs),
            finish_reason=reason,
            stop_reason=hit,
        )
        if reason:
            return


def _end(
    text: str, num_tokens: int, limit: int, end_after: int, sampling: SamplingParams
) -> tuple[FinishReason | None, str | None]:
    hit = next((stop for stop in sampling.stop if text.endswith(stop)), None)
    if num_tokens >= sampling.min_tokens:
        if hit is not None:
            return "stop", hit
        if num_tokens == end_after and not sampling.ignore_eos:
            return "stop", None
    return ("length" if num_tokens == limit else None), None


def _logprobs(character: str, num_alternatives: int | None) -> tuple[ChosenLogprob, ...]:
    if num_alternatives is None:
        return ()
    alternatives = [character, *(other for other in ALPHABET if other != character)][:num_alternatives]
    top = tuple(_candidate(other, -0.5 - rank) for rank, other in enumerate(alternatives))
    return (ChosenLogprob(_candidate(character, -0.5), top),)


def _candidate(character: str, logprob: float) -> TokenLogprob:
    return TokenLogprob(ord(character), character, character.encode(), logprob)


def _character(prompt: str, seed: int, choice: int, position: int) -> str:
    key = f"{prompt}|{seed}|{choice}|{position}".encode(errors="replace")
    return ALPHABET[hashlib.blake2b(key, digest_size=2).digest()[0] % len(ALPHABET)]


def _vector(item: str | tuple[int, ...]) -> NDArray[np.float32]:
    digest = hashlib.blake2b(repr(item).encode(errors="replace"), digest_size=DIMENSIONS).digest()
    return np.frombuffer(digest, np.uint8).astype(np.float32) / np.float32(255)
