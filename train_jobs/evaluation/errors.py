"""The error of an evaluation that cannot give a number."""

from cluster.errors import MantaError


class EvaluationError(MantaError):
    """There is nothing to evaluate on, the data do not fit the model, or its predictions are not numbers."""
