"""Labels of data in a model's numbers: two lists of names in, a number for each of the data's labels out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train_jobs.evaluation.errors import EvaluationError

_SHOWN = 5


def label_numbers(data_labels: Sequence[str], model_labels: Sequence[str]) -> NDArray[np.int64]:
    """The model's number of each of ``data_labels``, in their order; the two may be sorted differently.

    Raises EvaluationError naming the labels that the model does not know: it could never be right about them.
    """
    known = {label: number for number, label in enumerate(model_labels)}
    unknown = [label for label in data_labels if label not in known]
    if unknown:
        raise EvaluationError(
            f"evaluation: the model does not know {_named(unknown)} of the data; it knows {_named(model_labels)}; "
            "evaluate on data with its labels, or train it on these"
        )
    return np.array([known[label] for label in data_labels], dtype=np.int64)


def _named(labels: Sequence[str]) -> str:
    shown = ", ".join(repr(label) for label in labels[:_SHOWN])
    rest = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
    return f"label{'s' if len(labels) > 1 else ''} {shown}{rest}"
