"""Prompts become tokens without holding up the event loop."""

import asyncio

import pytest

from deployments.messages import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from deployments.replica.encode import PromptEncoder
from tests.support.tiny_tokenizer import tiny_text


def chat(num_messages: int) -> ChatPrompt:
    return ChatPrompt(messages=tuple({"role": "user", "content": ""} for _ in range(num_messages)))


@pytest.mark.parametrize(
    ("prompt", "at_once"),
    [
        (TextPrompt(text="hello"), True),
        (TextPrompt(text="hello" * 1000), False),
        (TokenPrompt(token_ids=(5,) * 100), True),
        (TokenPrompt(token_ids=(5,) * 100_000), False),
        (chat(1), True),
        (chat(1000), False),
    ],
)
async def test_only_what_is_quick_runs_on_the_event_loop(prompt: Prompt, at_once: bool) -> None:
    encoder = PromptEncoder(tiny_text(), context_tokens=200_000)
    encoding = asyncio.create_task(encoder.encode(prompt, "r"))
    await asyncio.sleep(0)
    assert encoding.done() is at_once
    assert await encoding
    encoder.stop()


async def test_long_inputs_of_token_ids_leave_the_event_loop_too() -> None:
    encoder = PromptEncoder(tiny_text(), context_tokens=200_000)
    encoding = asyncio.create_task(encoder.encode_inputs(((5,) * 100_000, "a"), "r"))
    await asyncio.sleep(0)
    assert not encoding.done()
    assert [len(token_ids) for token_ids in await encoding] == [100_000, 1]
    encoder.stop()
