"""The replica's telemetry, bound to the cluster's metrics."""

from collections.abc import Mapping

from cluster.telemetry.metrics import Metrics
from deployments.messages import Load, StageTiming
from deployments.replica.observe import EngineStats


class ReplicaTelemetry:
    """Implements :class:`deployments.replica.observe.EngineTelemetry`; totals and gauges come by :meth:`report`."""

    def __init__(self, *, model: str, version: str) -> None:
        self._metrics = Metrics(model=model, version=version)
        self._reported = EngineStats()

    def step_done(self, timing: StageTiming) -> None:
        """Stages count their own steps."""

    def first_token(self, seconds: float) -> None:
        """Time to the first token, as the replica sees it."""
        self._metrics.observe("manta_replica_time_to_first_token_seconds", seconds)

    def request_done(self, seconds_per_token: float | None, num_completion_tokens: int) -> None:  # noqa: ARG002
        """Time per output token; the gateway counts the tokens."""
        if seconds_per_token is not None:
            self._metrics.observe("manta_time_per_output_token_seconds", seconds_per_token)

    def recovered(self, num_replaced: int, parts_s: Mapping[str, float]) -> None:
        """Where the time of a recovery went."""
        self._metrics.count("manta_stages_replaced_total", num_replaced)
        for part, seconds in parts_s.items():
            self._metrics.observe("manta_recovery_seconds", seconds, part=part)

    def recomputed(self, seconds: float) -> None:
        """The last part of a recovery."""
        self._metrics.observe("manta_recovery_seconds", seconds, part="recompute")

    def report(self, load: Load, stats: EngineStats) -> None:
        """Set the gauges, and count what was added since the last report."""
        before, self._reported = self._reported, stats
        self._metrics.gauge("manta_num_requests_running", load.num_running)
        self._metrics.gauge("manta_num_requests_waiting", load.num_waiting)
        self._metrics.gauge("manta_num_tokens_waiting", load.num_waiting_tokens)
        self._metrics.gauge("manta_kv_cache_usage", load.kv_used_fraction)
        self._metrics.count("manta_recoveries_total", stats.num_recoveries - before.num_recoveries)
        self._metrics.count("manta_steps_total", stats.num_steps - before.num_steps)
        self._metrics.count("manta_preemptions_total", stats.num_preemptions - before.num_preemptions)
        self._metrics.count("manta_prefix_cache_queries_total", stats.num_prefix_queries - before.num_prefix_queries)
        self._metrics.count("manta_prefix_cache_hits_total", stats.num_prefix_hits - before.num_prefix_hits)
        self._metrics.count("manta_draft_tokens_total", stats.num_draft_tokens - before.num_draft_tokens)
        self._metrics.count("manta_accepted_tokens_total", stats.num_accepted_tokens - before.num_accepted_tokens)
        self._metrics.flush()
