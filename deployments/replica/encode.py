"""Prompts and inputs enter the replica's event loop, token ids leave; long ones are tokenized in a thread."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deployments.messages import ChatPrompt, Prompt, TextPrompt
from deployments.replica.text import TextTokenizer

_INLINE_CHARACTERS = 4096  # a few milliseconds of tokenizing; more would hold up the streams
_MESSAGE_CHARACTERS = 32  # rendering a message of a conversation costs about as much, however short it is
_Result = TypeVar("_Result")


class PromptEncoder:
    """Tokenizes without holding up the event loop; one thread, so that a flood of long prompts takes one core."""

    def __init__(self, tokenizer: TextTokenizer, context_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def encode(self, prompt: Prompt, request_id: str) -> list[int]:
        """Token ids of a prompt; raises RequestRefused."""
        return await self._run(
            _num_characters(prompt),
            lambda: self._tokenizer.encode(prompt, request_id=request_id, context_tokens=self._context_tokens),
        )

    async def encode_inputs(
        self, inputs: tuple[str | tuple[int, ...], ...], request_id: str
    ) -> list[tuple[int, ...]]:
        """Token ids of each input of an embedding request; raises RequestRefused."""
        return await self._run(
            sum(len(item) for item in inputs),
            lambda: self._tokenizer.encode_inputs(inputs, request_id=request_id, context_tokens=self._context_tokens),
        )

    async def _run(self, num_characters: int, work: Callable[[], _Result]) -> _Result:
        if num_characters <= _INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def stop(self) -> None:
        """Drop what is queued; what runs is finished in its thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _num_characters(prompt: Prompt) -> int:
    """About how much work a prompt is; looking at a token id is at most that of a character."""
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    if isinstance(prompt, ChatPrompt):
        messages = sum(_MESSAGE_CHARACTERS + len(str(message.get("content", ""))) for message in prompt.messages)
        return messages + sum(len(tool) for tool in prompt.tools)
    return len(prompt.token_ids)
