"""Whether a model prefers the better answer: rewards of pairs in, accuracy and margin out. Shape: B pairs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train_jobs.evaluation.errors import EvaluationError
from train_jobs.evaluation.exact import as_float, exact_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceSums:
    """What is added up over pairs; sums of parts of the data add to those of the whole, bit for bit."""

    num_pairs: int = 0
    num_correct: int = 0
    """Pairs whose chosen answer has the larger reward."""
    margin: int = 0
    """Chosen minus rejected reward, summed, in units of ``exact.UNIT``."""
    nats: int = 0
    """Losses of the pairs, summed, in the same units."""

    @classmethod
    def of(
        cls, chosen_B: NDArray[np.floating], rejected_B: NDArray[np.floating], nats_B: NDArray[np.floating]
    ) -> "PreferenceSums":
        """Sums of these pairs, by their rewards and losses; EvaluationError when one is not finite."""
        return cls(
            num_pairs=len(chosen_B),
            num_correct=int(np.count_nonzero(chosen_B > rejected_B)),
            margin=exact_sum(np.asarray(chosen_B, np.float64) - np.asarray(rejected_B, np.float64), "reward margin"),
            nats=exact_sum(nats_B, "loss"),
        )

    def __add__(self, other: "PreferenceSums") -> "PreferenceSums":
        return PreferenceSums(
            num_pairs=self.num_pairs + other.num_pairs,
            num_correct=self.num_correct + other.num_correct,
            margin=self.margin + other.margin,
            nats=self.nats + other.nats,
        )

    def metrics(self) -> dict[str, float | int]:
        """``loss``, ``accuracy``, ``margin``, ``num_pairs``; EvaluationError when there are no pairs."""
        if not self.num_pairs:
            raise EvaluationError("evaluation: the data have no pairs; give their preparation a split.eval_fraction")
        return {
            "loss": as_float(self.nats) / self.num_pairs,
            "accuracy": self.num_correct / self.num_pairs,
            "margin": as_float(self.margin) / self.num_pairs,
            "num_pairs": self.num_pairs,
        }
