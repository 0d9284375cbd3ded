"""The workloads, and their prompts: real English of an exact number of tokens, none of them sent twice in one run.

The text is Python's own language reference, as the standard library brings it for ``help()``; a prompt is a piece
from a random place, cut where it has the right length and comes back from the tokenizer as the same number of tokens.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """``num_streams`` requests at a time; each has ``prompt_tokens`` in, of which the first ``shared_tokens`` are the
    same in all, and ``output_tokens`` out."""

    name: str
    num_streams: int
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0

    @property
    def shape(self) -> str:
        """Streams and tokens, for a table."""
        own = self.prompt_tokens - self.shared_tokens
        prompt = f"{self.shared_tokens}+{own}" if self.shared_tokens else f"{own}"
        return f"{self.num_streams} x {prompt}/{self.output_tokens}"


def chat_like(name: str, num_streams: int) -> Workload:
    """A short prompt and a short answer."""
    return Workload(name=name, num_streams=num_streams, prompt_tokens=128, output_tokens=128)


WORKLOADS = {
    workload.name: workload
    for workload in (
        chat_like("W1", 1),
        chat_like("W2", 8),
        chat_like("W3", 16),
        chat_like("W4", 32),
        Workload(name="W5", num_streams=8, prompt_tokens=1024, output_tokens=64),
        Workload(name="W6", num_streams=8, prompt_tokens=964, output_tokens=64, shared_tokens=900),
    )
}


class PromptSource:
    """Prompts for one checkpoint's tokenizer; equal for every server that is measured."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        text = "\n\n".join(topics[name] for name in sorted(topics))
        self._corpus: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids

    def prompts(self, workload: Workload, repeat: int) -> Iterator[str]:
        """Endless; the same for the same workload and repeat, and different from those of any other."""
        rng = random.Random(f"{workload.name} {repeat}")
        head = self._piece(rng, workload.shared_tokens) if workload.shared_tokens else ""
        own_tokens = workload.prompt_tokens - workload.shared_tokens
        while True:
            prompt = head + self._piece(rng, own_tokens)
            if not head or self._length(prompt) == workload.prompt_tokens:
                yield prompt

    def _piece(self, rng: random.Random, num_tokens: int) -> str:
        while True:
            begin = rng.randrange(len(self._corpus) - num_tokens)
            text: str = self._tokenizer.decode(self._corpus[begin : begin + num_tokens])
            if self._length(text) == num_tokens:
                return text

    def _length(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)
