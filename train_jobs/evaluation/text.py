"""How well a model predicts a text: scores of its targets in, perplexity, bits per byte and token accuracy out.

Shape: N targets, that is predicted tokens.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train_jobs.evaluation.errors import EvaluationError
from train_jobs.evaluation.exact import as_float, exact_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSums:
    """What is added up over targets; sums of parts of the data add to those of the whole, bit for bit."""

    nats: int = 0
    """Negative log-likelihood of all targets, in units of ``exact.UNIT``."""
    num_targets: int = 0
    num_correct: int = 0
    """Targets that were the most likely token."""
    num_bytes: int = 0
    """UTF-8 bytes of the text that the targets spell."""

    @classmethod
    def of(cls, nats_N: NDArray[np.floating], correct_N: NDArray[np.bool_], *, num_bytes: int) -> "TextSums":
        """Sums of these targets; EvaluationError when a likelihood is not finite."""
        return cls(
            nats=exact_sum(nats_N, "log-likelihood"),
            num_targets=len(nats_N),
            num_correct=int(np.count_nonzero(correct_N)),
            num_bytes=num_bytes,
        )

    def __add__(self, other: "TextSums") -> "TextSums":
        return TextSums(
            nats=self.nats + other.nats,
            num_targets=self.num_targets + other.num_targets,
            num_correct=self.num_correct + other.num_correct,
            num_bytes=self.num_bytes + other.num_bytes,
        )

    def metrics(self) -> dict[str, float | int]:
        """``loss`` (nats per target), ``perplexity``, ``bits_per_byte``, ``token_accuracy``, ``num_targets``.

        Bits per byte do not depend on the tokenizer, so models that have different ones compare by it; it is absent
        where the bytes of the text are not known (0). Raises EvaluationError when there are no targets.
        """
        if not self.num_targets:
            raise EvaluationError(
                "evaluation: the data have no target to predict; look at the counts of their preparation"
            )
        nats = as_float(self.nats)
        loss = nats / self.num_targets
        found: dict[str, float | int] = {"loss": loss, "perplexity": _perplexity(loss)}
        if self.num_bytes:
            found["bits_per_byte"] = nats / math.log(2) / self.num_bytes
        return found | {"token_accuracy": self.num_correct / self.num_targets, "num_targets": self.num_targets}


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        raise EvaluationError(
            f"evaluation: a loss of {loss} nats per target has no perplexity; the model has diverged"
        ) from None
