"""What a stage measures: the timing of each step in, metrics out."""

from cluster.telemetry.metrics import Metrics
from deployments.messages import StageTiming


class StageTelemetry:
    """Sums the timings of one stage."""

    def __init__(self, *, model: str, version: str, stage: int) -> None:
        self._metrics = Metrics(model=model, version=version, stage=str(stage))

    def observe(self, timing: StageTiming) -> None:
        """Count one step."""
        self._metrics.count("manta_stage_steps_total")
        self._metrics.count("manta_stage_wait_seconds_total", timing.wait_s)
        self._metrics.count("manta_stage_bubble_seconds_total", timing.bubble_s)
        self._metrics.count("manta_stage_compute_seconds_total", timing.compute_s)
        self._metrics.count("manta_stage_transfer_seconds_total", timing.transfer_s)
