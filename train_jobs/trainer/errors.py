"""Every error that training raises on purpose, besides PlanError for what is asked for and cannot be."""

from cluster.errors import MantaError


class TrainingError(MantaError):
    """Training cannot go on: the loss is not finite, or a step has nothing to learn from."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written, or none can be read."""
