"""The gateway's telemetry, bound to the cluster's metrics."""

from collections import defaultdict

from cluster.telemetry.metrics import Metrics


class GatewayTelemetry:
    """Implements :class:`deployments.gateway.telemetry.Telemetry` over Ray's metrics."""

    def __init__(self) -> None:
        self._metrics = Metrics()
        self._in_flight: defaultdict[str, int] = defaultdict(int)

    def started(self, *, endpoint: str) -> None:
        """One more request in flight."""
        self._move(endpoint, 1)

    def first_token(self, *, endpoint: str, model: str, seconds: float) -> None:
        """Time to the first token."""
        self._metrics.observe("manta_time_to_first_token_seconds", seconds, endpoint=endpoint, model=model)

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
        """Count an answered request and its tokens."""
        self._move(endpoint, -1)
        self._metrics.count("manta_requests_total", status=str(status), endpoint=endpoint, model=model)
        self._metrics.count("manta_prompt_tokens_total", num_prompt_tokens, endpoint=endpoint, model=model)
        self._metrics.count("manta_cached_prompt_tokens_total", num_cached_tokens, endpoint=endpoint, model=model)
        self._metrics.count("manta_generation_tokens_total", num_completion_tokens, endpoint=endpoint, model=model)
        self._metrics.observe("manta_e2e_request_latency_seconds", seconds, endpoint=endpoint, model=model)

    def handed_over(self, model: str, cause: str) -> None:
        """Count a stream that leaves its replica before its end."""
        self._metrics.count("manta_hand_overs_total", model=model, cause=cause)

    def refused(self, *, endpoint: str, model: str, status: int, code: str, seconds: float) -> None:  # noqa: ARG002
        """Count a refused or broken request."""
        self._move(endpoint, -1)
        self._metrics.count("manta_requests_total", status=str(status), endpoint=endpoint, model=model)
        self._metrics.count("manta_refusals_total", code=code, endpoint=endpoint, model=model)

    def _move(self, endpoint: str, change: int) -> None:
        self._in_flight[endpoint] += change
        self._metrics.gauge("manta_requests_in_flight", self._in_flight[endpoint], endpoint=endpoint)
