"""Drives an engine over the fake pipeline, and says what every request must come to."""

import asyncio
import codecs
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from deployments.messages import (
    Delta,
    Finished,
    Generate,
    Refused,
    RequestRefused,
    SamplingParams,
    Started,
    TokenPrompt,
)
from deployments.replica.engine import Engine, EngineConfig
from tests.support.fake_stage import FakeStageLink, reference_tokens
from tests.support.tiny_tokenizer import EOS_ID, tiny_text

TEXT = tiny_text()
VOCAB_SIZE = 12
"""The fake pipeline generates ids below this: an end token, a pad, and ten ASCII characters."""


class FakeClock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def config(**changes: Any) -> EngineConfig:
    """A small engine: 4 tokens per block, room for four contexts."""
    defaults: dict[str, Any] = {
        "context_tokens": 64,
        "num_blocks": 64,
        "block_tokens": 4,
        "max_running": 8,
        "max_step_tokens": 16,
        "max_waiting": 64,
        "min_decode_split": 1,
        "min_prefill_chunk": 4,
    }
    return EngineConfig(**(defaults | changes))


def link_for(settings: EngineConfig, num_stages: int = 2, **options: Any) -> FakeStageLink:
    """A fake pipeline that fits an engine's config."""
    return FakeStageLink(
        num_stages=num_stages,
        num_blocks=settings.num_blocks,
        block_tokens=settings.block_tokens,
        vocab_size=VOCAB_SIZE,
        max_step_tokens=settings.max_step_tokens,
        **options,
    )


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[Engine]:
    """Start an engine; at the end nothing may be left in it, and it must not have failed."""
    await engine.start()
    try:
        yield engine
        assert engine.failed is None, engine.failed
        engine.pool.check_integrity([sequence.blocks for sequence in engine.scheduler.running])
        assert engine.pool.num_used == 0
        assert (engine.load().num_running, engine.load().num_waiting) == (0, 0)
    finally:
        await engine.stop()


def generate(
    request_id: str = "r", prompt: Sequence[int] = (5, 6, 7), *, max_tokens: int | None = 8, **sampling: Any
) -> Generate:
    """A request; greedy and endless unless told otherwise."""
    deadline_s = sampling.pop("deadline_s", 600.0)
    params = {"temperature": 0.0, "seed": 1, "ignore_eos": True} | sampling
    return Generate(
        request_id=request_id,
        prompt=TokenPrompt(token_ids=tuple(prompt)),
        sampling=SamplingParams(max_tokens=max_tokens or 0, **params),
        max_tokens=max_tokens,
        deadline_s=deadline_s,
    )


@dataclass
class Outcome:
    """All that one client saw."""

    started: Started | None = None
    deltas: list[Delta] = field(default_factory=list)
    finished: Finished | None = None
    refused: Refused | None = None

    def tokens(self, index: int = 0) -> list[int]:
        return [token_id for delta in self.deltas if delta.index == index for token_id in delta.token_ids]

    def text(self, index: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas if delta.index == index)

    def ends(self, index: int = 0) -> list[tuple[str, str | int | None]]:
        return [
            (delta.finish_reason, delta.stop_reason)
            for delta in self.deltas
            if delta.index == index and delta.finish_reason is not None
        ]


async def collect(engine: Engine, request: Generate, *, leave_after: int | None = None) -> Outcome:
    """Run one request to its end, or close it after ``leave_after`` events."""
    outcome = Outcome()
    events = engine.submit(request)
    num_events = 0
    try:
        async for event in events:
            assert outcome.finished is None, "nothing may follow Finished"
            match event:
                case Started():
                    assert outcome.started is None
                    assert not outcome.deltas
                    outcome.started = event
                case Delta():
                    assert not outcome.ends(event.index), "nothing may follow the end of a choice"
                    outcome.deltas.append(event)
                case Finished():
                    outcome.finished = event
            num_events += 1
            if num_events == leave_after:
                break
    except RequestRefused as error:
        outcome.refused = error.refused
    finally:
        await events.aclose()
    return outcome


@dataclass
class Expected:
    """What one choice must come to."""

    tokens: list[int]
    text: str
    finish_reason: str
    stop_reason: str | int | None


def expected_choice(request: Generate, index: int = 0, *, seed: int | None = None) -> Expected:
    """Computed from the request alone: the pipeline's reference tokens, cut at the first stop."""
    sampling = request.sampling
    assert isinstance(request.prompt, TokenPrompt)
    assert request.max_tokens is not None
    tokens = reference_tokens(
        request.prompt.token_ids,
        sampling,
        seed=sampling.seed if seed is None else seed,
        choice=index,
        eos_token_ids=(EOS_ID,),
        vocab_size=VOCAB_SIZE,
    )
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, unarmed = "", 0
    for num_emitted, token_id in enumerate(tokens, start=1):
        armed = num_emitted > sampling.min_tokens
        ends = armed and (token_id in sampling.stop_token_ids or (token_id == EOS_ID and not sampling.ignore_eos))
        shown = not ends or sampling.include_stop_str_in_output
        if shown and not (sampling.skip_special_tokens and token_id in (0, 1)):
            text += decoder.decode(TEXT.token_bytes(token_id))
        if ends:
            reason = token_id if token_id in sampling.stop_token_ids else None
            return Expected(tokens[:num_emitted], text, "stop", reason)
        if not armed:
            unarmed = len(text)
            continue
        hits = [(at + len(stop), at, stop) for stop in sampling.stop if (at := text.find(stop, unarmed)) >= 0]
        if hits:  # complete first; of those, the longest
            end, at, stop = min(hits)
            shown_text = text[: end if sampling.include_stop_str_in_output else at]
            return Expected(tokens[:num_emitted], shown_text, "stop", stop)
    return Expected(tokens, text, "length", None)


def check(request: Generate, outcome: Outcome) -> None:
    """The request must have ended well, each choice exactly as expected."""
    assert outcome.refused is None, outcome.refused
    assert outcome.started is not None
    assert outcome.finished is not None
    assert isinstance(request.prompt, TokenPrompt)
    seed = outcome.started.seed
    num_tokens = 0
    for index in range(request.sampling.n):
        expected = expected_choice(request, index, seed=seed)
        assert outcome.tokens(index) == expected.tokens
        assert outcome.text(index) == expected.text
        assert outcome.ends(index) == [(expected.finish_reason, expected.stop_reason)]
        num_tokens += len(expected.tokens)
    assert outcome.finished.num_completion_tokens == num_tokens
    assert outcome.finished.num_prompt_tokens == len(request.prompt.token_ids)


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else run until ``condition`` holds; fails when it never does."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("what the test waits for never happened")


async def ticks(number: int) -> None:
    """Let everything else run ``number`` turns of the event loop."""
    for _ in range(number):
        await asyncio.sleep(0)
