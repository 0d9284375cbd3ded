"""Who does the work: chunks enter, their batches leave in the order of the chunks."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from train_jobs.data.chunking import Chunk
from train_jobs.data.transform import Batch, Transform


class Executor(Protocol):
    """Runs a transform over chunks; whatever it runs on, the batches and their order are the same."""

    def run(self, transform: Transform, chunks: Sequence[Chunk]) -> Iterator[Batch]:
        """The batches of all chunks, in order; errors of the transform come through as they are."""
        ...


class InlineExecutor:
    """Works in this process, one chunk after the other."""

    def run(self, transform: Transform, chunks: Sequence[Chunk]) -> Iterator[Batch]:
        """The batches of all chunks, in order."""
        for chunk in chunks:
            yield from transform(chunk)
