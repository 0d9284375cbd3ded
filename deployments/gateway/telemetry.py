"""What the gateway measures: a Protocol, bound to the cluster's metrics by whoever builds the app."""

from typing import Protocol


class Telemetry(Protocol):
    """Every request that reaches a model endpoint is ``started`` once, then either ``finished`` or ``refused`` once.

    ``endpoint`` is the path (``/v1/completions``); ``model`` is a served name, or empty where the request named
    none that is served, so that labels stay few. Durations are seconds since the request arrived.
    """

    def started(self, *, endpoint: str) -> None:
        """A request arrived."""
        ...

    def first_token(self, *, endpoint: str, model: str, seconds: float) -> None:
        """The first token of any choice came back from the model."""
        ...

    def finished(
        self,
        *,
        endpoint: str,
        model: str,
        status: int,
        seconds: float,
        num_prompt_tokens: int,
        num_cached_tokens: int,
        num_completion_tokens: int,
    ) -> None:
        """The request was answered (200), or the client left before the end (499)."""
        ...

    def handed_over(self, model: str, cause: str) -> None:
        """A stream that had begun leaves its replica, which is ``lost`` or ``draining``, and goes on with another."""
        ...

    def refused(self, *, endpoint: str, model: str, status: int, code: str, seconds: float) -> None:
        """The request failed, before the answer or in the middle of it; ``code`` is the error table's."""
        ...


class NoTelemetry:
    """Measures nothing."""

    def started(self, *, endpoint: str) -> None:
        """Do nothing."""

    def first_token(self, *, endpoint: str, model: str, seconds: float) -> None:
        """Do nothing."""

    def finished(
        self,
        *,
        endpoint: str,
        model: str,
        status: int,
        seconds: float,
        num_prompt_tokens: int,
        num_cached_tokens: int,
        num_completion_tokens: int,
    ) -> None:
        """Do nothing."""

    def handed_over(self, model: str, cause: str) -> None:
        """Do nothing."""

    def refused(self, *, endpoint: str, model: str, status: int, code: str, seconds: float) -> None:
        """Do nothing."""
