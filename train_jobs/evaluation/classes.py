"""How well a model classifies: probabilities and labels in, accuracy, macro-F1, calibration and a table out.

Shapes: B items, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train_jobs.evaluation.calibration import CalibrationSums
from train_jobs.evaluation.errors import EvaluationError
from train_jobs.evaluation.exact import as_float, exact_sum

_SMALLEST = 2.0**-126  # a probability of 0 would cost infinitely many nats; this is float32's smallest normal number


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSums:
    """What is added up over items; sums of parts of the data add to those of the whole, bit for bit."""

    confusion: tuple[tuple[int, ...], ...]
    """Items by true class (row) and predicted class (column)."""
    nats: int = 0
    """Negative log-likelihood of the true classes, in units of ``exact.UNIT``."""
    calibration: CalibrationSums = field(default_factory=CalibrationSums)

    @classmethod
    def empty(cls, num_classes: int) -> "ClassSums":
        """Of no items."""
        return cls(confusion=((0,) * num_classes,) * num_classes)

    @classmethod
    def of(cls, probabilities_BC: NDArray[np.floating], labels_B: NDArray[np.integer]) -> "ClassSums":
        """Sums of these items; the predicted class is the most likely one, of equals the first.

        Raises EvaluationError for a label that is no column, and for probabilities that are not finite.
        """
        num_classes = probabilities_BC.shape[1]
        labels = np.asarray(labels_B, dtype=np.int64)
        if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
            wrong = labels[(labels < 0) | (labels >= num_classes)][0]
            raise EvaluationError(f"evaluation: label number {wrong}; the model has classes 0 to {num_classes - 1}")
        predicted_B = probabilities_BC.argmax(axis=1)
        confusion = np.bincount(labels * num_classes + predicted_B, minlength=num_classes**2)
        rows = np.arange(len(labels))
        true_B = np.asarray(probabilities_BC[rows, labels], dtype=np.float64)
        return cls(
            confusion=tuple(map(tuple, confusion.reshape(num_classes, num_classes).tolist())),
            nats=exact_sum(-np.log(np.maximum(true_B, _SMALLEST)), "log-likelihood"),
            calibration=CalibrationSums.of(probabilities_BC[rows, predicted_B], predicted_B == labels),
        )

    def __add__(self, other: "ClassSums") -> "ClassSums":
        pairs = zip(self.confusion, other.confusion, strict=True)
        return ClassSums(
            confusion=tuple(tuple(a + b for a, b in zip(ours, theirs, strict=True)) for ours, theirs in pairs),
            nats=self.nats + other.nats,
            calibration=self.calibration + other.calibration,
        )

    def metrics(self, labels: Sequence[str]) -> dict[str, Any]:
        """``loss``, ``accuracy``, ``macro_f1``, ``calibration_error``, ``num_items``, and the tables.

        ``classes`` has a row for each of ``labels`` (:meth:`rows`), ``confusion`` is true by predicted, and
        ``calibration`` has the reliability bins. Macro-F1 is the plain mean of F1 over the classes that occur among
        the true or the predicted ones, as scikit-learn's. Raises EvaluationError when there are no items.
        """
        counts = np.array(self.confusion, dtype=np.int64)
        num_items = int(counts.sum())
        if not num_items:
            raise EvaluationError("evaluation: the data have no items; give their preparation a split.eval_fraction")
        rows = self.rows(labels)
        occurring = (counts.sum(axis=0) + counts.sum(axis=1)) > 0
        return {
            "loss": as_float(self.nats) / num_items,
            "accuracy": int(np.trace(counts)) / num_items,
            "macro_f1": float(np.mean([row["f1"] for row, occurs in zip(rows, occurring, strict=True) if occurs])),
            "calibration_error": self.calibration.expected_error(),
            "num_items": num_items,
            "classes": rows,
            "confusion": counts.tolist(),
            "calibration": self.calibration.bins(),
        }

    def rows(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Per class: ``label``, ``precision``, ``recall``, ``f1``, ``support`` (true items); a ratio to 0 is 0."""
        counts = np.array(self.confusion, dtype=np.int64)
        predicted, true = counts.sum(axis=0), counts.sum(axis=1)
        found = []
        for number, label in enumerate(labels):
            hits, num_predicted, support = int(counts[number, number]), int(predicted[number]), int(true[number])
            found.append(
                {
                    "label": label,
                    "precision": hits / num_predicted if num_predicted else 0.0,
                    "recall": hits / support if support else 0.0,
                    "f1": 2 * hits / (num_predicted + support) if num_predicted + support else 0.0,
                    "support": support,
                }
            )
        return found
