"""Every metric by name, label and meaning, in one table; values in, Ray's metrics out.

Ray's agents export them with the prefix ``ray_``. Meanings follow what the field's dashboards expect:
seconds for durations, tokens for counts, a fraction of 1 for use.
"""

import time
from collections import defaultdict
from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge, Histogram

_LATENCY_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_S = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5)

GATEWAY = ("model", "endpoint")
REPLICA = ("model", "version")
STAGE = ("model", "version", "stage")
JOB = ("job",)
WORKER = ("job", "worker")

COUNTERS: dict[str, tuple[str, Sequence[str]]] = {
    "manta_requests_total": ("Requests answered or refused, by HTTP status.", (*GATEWAY, "status")),
    "manta_refusals_total": ("Requests refused or broken off, by the error's code.", (*GATEWAY, "code")),
    "manta_hand_overs_total": ("Begun streams that left a replica, lost or draining.", ("model", "cause")),
    "manta_prompt_tokens_total": ("Prompt tokens of finished requests.", GATEWAY),
    "manta_cached_prompt_tokens_total": ("Prompt tokens found in the prefix cache.", GATEWAY),
    "manta_generation_tokens_total": ("Tokens generated for finished requests.", GATEWAY),
    "manta_prefix_cache_queries_total": ("Prompt tokens looked up in the prefix cache.", REPLICA),
    "manta_prefix_cache_hits_total": ("Prompt tokens found there.", REPLICA),
    "manta_draft_tokens_total": ("Tokens guessed ahead, in texts that repeat themselves.", REPLICA),
    "manta_accepted_tokens_total": ("Those that were right.", REPLICA),
    "manta_preemptions_total": ("Sequences whose blocks were taken back, to be recomputed.", REPLICA),
    "manta_recoveries_total": ("Times that streams went on after stages had been lost.", REPLICA),
    "manta_stages_replaced_total": ("Stage processes that were started in place of lost ones.", REPLICA),
    "manta_steps_total": ("Micro-batches computed.", REPLICA),
    "manta_stage_wait_seconds_total": ("Time a stage waited for a step or for activations.", STAGE),
    "manta_stage_bubble_seconds_total": ("The part of it in which the pipeline had work under way.", STAGE),
    "manta_stage_compute_seconds_total": ("Time a stage computed.", STAGE),
    "manta_stage_transfer_seconds_total": ("Time a stage took to send its result, beside computing.", STAGE),
    "manta_stage_steps_total": ("Steps a stage computed.", STAGE),
    "manta_train_tokens_total": ("Tokens trained on, without padding.", JOB),
    "manta_train_step_seconds_total": ("Time that steps took.", JOB),
    "manta_train_data_wait_seconds_total": ("The part of it in which the first worker waited for data.", JOB),
    "manta_train_checkpoint_stall_seconds_total": ("The part of it in which it was held up by checkpoints.", JOB),
}
GAUGES: dict[str, tuple[str, Sequence[str]]] = {
    "manta_requests_in_flight": ("Requests the gateway is working on.", ("endpoint",)),
    "manta_num_requests_running": ("Sequences in the running batch.", REPLICA),
    "manta_num_requests_waiting": ("Requests waiting to be admitted to the batch.", REPLICA),
    "manta_num_tokens_waiting": ("Prompt tokens not yet computed.", REPLICA),
    "manta_kv_cache_usage": ("Fraction of KV blocks in use.", REPLICA),
    "manta_train_step": ("Steps done.", JOB),
    "manta_train_loss": ("Mean over the targets of the last step.", JOB),
    "manta_train_learning_rate": ("Of the last step.", JOB),
    "manta_train_grad_norm": ("Of the last step, before clipping.", JOB),
    "manta_train_tokens_per_second": ("Of the last step, over all workers.", JOB),
    "manta_train_mfu": ("Achieved share of the devices' matrix product rate.", JOB),
    "manta_train_padding_ratio": ("Share of the last step's positions that are padding.", JOB),
    "manta_train_staleness": ("Updates since the weights of the last step's gradient (parameter_server).", JOB),
    "manta_train_evaluation": ("Of the last evaluation, each of its numbers.", ("job", "metric")),
    "manta_train_memory_bytes": ("Resident memory of a worker, or what its accelerator has allocated.", WORKER),
}
HISTOGRAMS: dict[str, tuple[str, Sequence[str], Sequence[float]]] = {
    "manta_time_to_first_token_seconds": ("From the request's arrival to its first token.", GATEWAY, _LATENCY_S),
    "manta_replica_time_to_first_token_seconds": ("The same, from arrival at the replica.", REPLICA, _LATENCY_S),
    "manta_e2e_request_latency_seconds": ("From arrival to the last token.", GATEWAY, _LATENCY_S),
    "manta_recovery_seconds": ("Recovery from lost stages, by part.", (*REPLICA, "part"), _LATENCY_S),
    "manta_time_per_output_token_seconds": ("Per request: (last - first token) / (tokens - 1).", REPLICA, _TOKEN_S),
}

FLUSH_S = 1.0


class Metrics:
    """The metrics of one process, created when first used. ``labels`` are those common to every record."""

    def __init__(self, **labels: str) -> None:
        self._labels = labels
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        self._pending: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        self._flushed = time.monotonic()

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter. Cheap: sums are handed to Ray about once a second (see :meth:`flush`)."""
        if amount:
            self._pending[name, tuple(sorted(labels.items()))] += amount
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Hand pending sums to Ray."""
        self._flushed = time.monotonic()
        for (name, labels), amount in self._pending.items():
            if name not in self._counters:
                description, keys = COUNTERS[name]
                self._counters[name] = Counter(name, description, tag_keys=tuple(keys))
            self._counters[name].inc(amount, tags=self._labels | dict(labels))
        self._pending.clear()

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        if name not in self._gauges:
            description, keys = GAUGES[name]
            self._gauges[name] = Gauge(name, description, tag_keys=tuple(keys))
        self._gauges[name].set(value, tags=self._labels | labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        if name not in self._histograms:
            description, keys, boundaries = HISTOGRAMS[name]
            self._histograms[name] = Histogram(name, description, boundaries=list(boundaries), tag_keys=tuple(keys))
        self._histograms[name].observe(value, tags=self._labels | labels)
