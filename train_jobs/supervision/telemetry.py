"""The numbers of training as Ray's metrics: reports of steps and evaluations in, gauges and counters out."""

from collections.abc import Mapping
from typing import Any

from cluster.runs.log import StepReport
from cluster.telemetry.metrics import Metrics


class TrainTelemetry:
    """Metrics of one worker; those of the whole run are the first worker's to tell."""

    def __init__(self, job: str, rank: int) -> None:
        self._metrics = Metrics(job=job)
        self._rank = rank
        self._told = 0

    def count(self, report: StepReport) -> None:
        """Add up one step; cheap."""
        if self._rank == 0:
            self._metrics.count("manta_train_tokens_total", report.num_tokens)
            self._metrics.count("manta_train_step_seconds_total", report.step_s)
            self._metrics.count("manta_train_data_wait_seconds_total", report.data_wait_s)
            self._metrics.count("manta_train_checkpoint_stall_seconds_total", report.checkpoint_stall_s)

    def tell(self, report: StepReport) -> None:
        """Set the gauges to a step's values, unless they are already."""
        if report.step == self._told:
            return
        self._told = report.step
        self._metrics.gauge("manta_train_memory_bytes", report.memory_bytes, worker=str(self._rank))
        if self._rank == 0:
            self._metrics.gauge("manta_train_step", report.step)
            self._metrics.gauge("manta_train_loss", report.loss)
            self._metrics.gauge("manta_train_learning_rate", report.learning_rate)
            self._metrics.gauge("manta_train_grad_norm", report.grad_norm)
            self._metrics.gauge("manta_train_tokens_per_second", report.tokens_per_s)
            self._metrics.gauge("manta_train_mfu", report.mfu)
            self._metrics.gauge("manta_train_padding_ratio", report.padding_ratio)
            self._metrics.gauge("manta_train_staleness", report.staleness)

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """Set the gauges of an evaluation's numbers."""
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._metrics.gauge("manta_train_evaluation", value, metric=name)

    def close(self) -> None:
        """Hand over what is pending."""
        self._metrics.flush()
