"""What the gateway needs of whoever runs the models: requests in, streams of messages out."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.plan.types import Route, RoutingTable, Task
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
    Started,
    Tokenize,
    Tokenized,
)

Event = Started | Delta | Finished


class EventStream(Protocol):
    """Started, then deltas, then Finished; every async generator of events is one.

    Iterating raises :class:`deployments.messages.RequestRefused`, before the first event or in the middle.
    ``aclose`` cancels the request upstream and is harmless after the end.
    """

    def __aiter__(self) -> AsyncIterator[Event]: ...
    async def __anext__(self) -> Event: ...
    async def aclose(self) -> None:
        """End it, and cancel upstream what has not ended."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHealth:
    """How one served model is doing."""

    model: str
    task: Task
    num_replicas: int
    num_running: int
    """Sequences in the running batches of all replicas, as they said last (about once a second)."""
    num_waiting: int
    """Requests that wait for a place in a batch."""
    kv_used_fraction: float
    """Of the replica that has the least room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether requests can be answered now, and by what; ``status`` is ``ok`` or the reason they cannot."""

    status: Literal["ok", "starting", "draining"]
    models: tuple[ModelHealth, ...]


class Backend(Protocol):
    """The models behind the gateway.

    Every method that waits raises :class:`deployments.messages.RequestRefused` where the request cannot be done,
    and may be cancelled at any time: what it held upstream is then freed.
    """

    @property
    def table(self) -> RoutingTable:
        """The routing table in force, with the gateway's settings; may be another object at every call."""
        ...

    def find(self, model: str) -> Route | None:
        """The route that serves ``model``, None when nobody does."""
        ...

    def generate(self, model: str, request: Generate) -> EventStream:
        """Start generating; nothing is sent before the first event is asked for."""
        ...

    async def embed(self, model: str, request: Embed) -> tuple[Embedded, NDArray[np.float32]]:
        """One vector per input, shape [num_vectors, dimensions]."""
        ...

    async def classify(self, model: str, request: Classify) -> tuple[Classified, NDArray[np.float32]]:
        """The probability of every label for each input, shape [num_inputs, num_labels]."""
        ...

    async def tokenize(self, model: str, request: Tokenize) -> Tokenized:
        """Token ids of a prompt."""
        ...

    async def detokenize(self, model: str, request: Detokenize) -> Detokenized:
        """Text of token ids."""
        ...

    def health(self) -> Health:
        """What can be said without asking anybody."""
        ...
