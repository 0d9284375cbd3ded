"""Whether confidence means what it says: confidences and whether each prediction was right in, expected error out.

Expected calibration error with equal-width bins: Naeini, Cooper, Hauskrecht, "Obtaining Well Calibrated Probabilities
Using Bayesian Binning" (AAAI 2015); bins (k/15, (k+1)/15] as in Guo et al., "On Calibration of Modern Neural
Networks" (arXiv 1706.04599).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train_jobs.evaluation.errors import EvaluationError
from train_jobs.evaluation.exact import as_float, exact_sum

NUM_BINS = 15
_ROUNDING = 1e-5  # a softmax in float32 may give a little more than 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSums:
    """Predictions by confidence bin; sums of parts of the data add to those of the whole, bit for bit."""

    num_predictions: tuple[int, ...] = (0,) * NUM_BINS
    num_correct: tuple[int, ...] = (0,) * NUM_BINS
    confidence: tuple[int, ...] = (0,) * NUM_BINS
    """Summed, in units of ``exact.UNIT``."""

    @classmethod
    def of(cls, confidence_B: NDArray[np.floating], correct_B: NDArray[np.bool_]) -> "CalibrationSums":
        """Sums of these predictions; EvaluationError when a confidence is outside 0..1."""
        values = np.asarray(confidence_B, dtype=np.float64)
        wrong = ~((values >= 0.0) & (values <= 1.0 + _ROUNDING))
        if wrong.any():
            raise EvaluationError(f"evaluation: a confidence of {values[wrong][0]}; allowed: 0 to 1")
        bins = np.clip(np.ceil(values * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
        chosen = [bins == number for number in range(NUM_BINS)]
        return cls(
            num_predictions=tuple(int(np.count_nonzero(which)) for which in chosen),
            num_correct=tuple(int(np.count_nonzero(correct_B[which])) for which in chosen),
            confidence=tuple(exact_sum(values[which], "confidence") for which in chosen),
        )

    def __add__(self, other: "CalibrationSums") -> "CalibrationSums":
        return CalibrationSums(
            num_predictions=_added(self.num_predictions, other.num_predictions),
            num_correct=_added(self.num_correct, other.num_correct),
            confidence=_added(self.confidence, other.confidence),
        )

    def expected_error(self) -> float:
        """Mean over predictions of the difference between a bin's accuracy and its mean confidence; 0 is perfect."""
        total = sum(self.num_predictions)
        if not total:
            raise EvaluationError("evaluation: there are no predictions to calibrate by")
        pairs = zip(self.num_correct, self.confidence, strict=True)
        return sum(abs(correct - as_float(confidence)) for correct, confidence in pairs) / total

    def bins(self) -> list[dict[str, float | int]]:
        """Rows of a reliability table: the bins that hold anything, with accuracy and mean confidence."""
        rows: list[dict[str, float | int]] = []
        for number, count in enumerate(self.num_predictions):
            if count:
                accuracy, confidence = self.num_correct[number] / count, as_float(self.confidence[number]) / count
                row = {"above": number / NUM_BINS, "up_to": (number + 1) / NUM_BINS, "num_predictions": count}
                rows.append(row | {"accuracy": accuracy, "confidence": confidence})
        return rows


def _added(ours: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(ours, theirs, strict=True))
