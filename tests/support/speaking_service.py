"""A replica's service without a model: it says its own name, and can be held, or drain."""

import asyncio
from collections.abc import AsyncGenerator

import numpy as np
from numpy.typing import NDArray

from deployments.messages import (
    Classified,
    Classify,
    Delta,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    Finished,
    Generate,
    Load,
    Refused,
    RequestRefused,
    Started,
    Tokenize,
    Tokenized,
)


class SpeakingService:
    """Says its own name, one character at a time; holds after ``hold_after`` characters until released."""

    def __init__(self, name: str, *, hold_after: int | None = None, draining: bool = False) -> None:
        self.name = name
        self.hold_after = hold_after
        self.draining = draining
        self.released = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.seen: list[str] = []

    async def generate(self, request: Generate) -> AsyncGenerator[Started | Delta | Finished]:
        self.seen.append(request.request_id)
        if self.draining:
            raise RequestRefused(Refused(request_id=request.request_id, code="draining", message="leaving"))
        try:
            yield Started(request_id=request.request_id, num_prompt_tokens=1, num_cached_tokens=0, seed=1)
            for index, character in enumerate(self.name):
                if index == self.hold_after:
                    await self.released.wait()
                last = index == len(self.name) - 1
                yield Delta(
                    request_id=request.request_id,
                    index=0,
                    text=character,
                    token_ids=(index,),
                    finish_reason="stop" if last else None,
                )
            yield Finished(
                request_id=request.request_id,
                num_prompt_tokens=1,
                num_cached_tokens=0,
                num_completion_tokens=len(self.name),
            )
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def embed(self, request: Embed) -> tuple[Embedded, NDArray[np.float32]]:
        vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
        header = Embedded(request_id=request.request_id, num_vectors=2, dimensions=3, num_prompt_tokens=4)
        return header, vectors

    async def classify(self, request: Classify) -> tuple[Classified, NDArray[np.float32]]:
        header = Classified(request_id=request.request_id, labels=("no", "yes"), num_inputs=1, num_prompt_tokens=3)
        return header, np.array([[0.25, 0.75]], dtype=np.float32)

    def tokenize(self, request: Tokenize) -> Tokenized:
        raise ValueError("a mistake of ours")

    def detokenize(self, request: Detokenize) -> Detokenized:
        return Detokenized(request_id=request.request_id, text="".join(chr(t) for t in request.token_ids))

    def load(self) -> Load:
        return Load(num_running=0, num_waiting=0, num_waiting_tokens=0, kv_used_fraction=0.0, draining=self.draining)
