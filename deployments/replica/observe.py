"""What an engine tells of itself: running totals in :class:`EngineStats`, single observations through a protocol."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from deployments.messages import StageTiming


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Totals since the engine was made, and what it holds now."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    num_prefix_hits: int = 0
    """Prompt tokens found there."""
    num_draft_tokens: int = 0
    """Tokens guessed, and computed along with a known one."""
    num_accepted_tokens: int = 0
    """Those that were right."""
    num_recoveries: int = 0
    """Times that lost stages were replaced."""
    num_results: int = 0
    """Tokens sampled, or batches embedded."""
    num_requests_done: int = 0
    num_requests_refused: int = 0
    """Refused at the door, or ended by an error or a deadline."""
    num_requests_cancelled: int = 0
    num_running: int = 0
    """Sequences that hold blocks."""
    num_waiting: int = 0
    """Sequences that wait for blocks."""
    num_blocks_used: int = 0
    kv_used_fraction: float = 0.0


class EngineTelemetry(Protocol):
    """Receives single observations as they happen; must return quickly."""

    def step_done(self, timing: StageTiming) -> None:
        """The last stage answered a step."""

    def first_token(self, seconds: float) -> None:
        """A request's first token came this long after its arrival."""

    def request_done(self, seconds_per_token: float | None, num_completion_tokens: int) -> None:
        """A request finished; ``seconds_per_token`` is over the tokens after the first, None without any."""

    def recomputed(self, seconds: float) -> None:
        """The first token came this long after lost stages had been replaced."""


class RecoveryTelemetry(Protocol):
    """Receives what it took to replace lost stages."""

    def recovered(self, num_replaced: int, parts_s: Mapping[str, float]) -> None:
        """``num_replaced`` stages are new; seconds by part: detect, spawn, load, connect."""


class NoTelemetry:
    """Observes nothing."""

    def recovered(self, num_replaced: int, parts_s: Mapping[str, float]) -> None:
        """Ignore it."""

    def recomputed(self, seconds: float) -> None:
        """Ignore it."""

    def step_done(self, timing: StageTiming) -> None:
        """Ignore it."""

    def first_token(self, seconds: float) -> None:
        """Ignore it."""

    def request_done(self, seconds_per_token: float | None, num_completion_tokens: int) -> None:
        """Ignore it."""


class MeanDuration:
    """Exponentially weighted mean of how long requests take, in seconds."""

    _WEIGHT = 0.2

    def __init__(self) -> None:
        self.seconds: float | None = None

    def add(self, seconds: float) -> None:
        """Take one more request into account."""
        self.seconds = seconds if self.seconds is None else self.seconds + self._WEIGHT * (seconds - self.seconds)

    def retry_after_s(self, num_ahead: int, num_parallel: int) -> float:
        """When a client that was turned away should try again: the time until ``num_ahead`` requests have begun.

        At least one second, also while nothing has been measured.
        """
        return max(1.0, (self.seconds or 0.0) * num_ahead / max(1, num_parallel))
