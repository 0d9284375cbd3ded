"""Sums of scores as integers: arrays of numbers in, a sum out that no order and no cut of the data changes.

Floating-point sums depend on their order, so an evaluation would depend on the number of workers. Every score is
rounded to a multiple of 2**-32 first, which is finer than float32 for all scores above 2**-8, and integers are added.
"""

import numpy as np
from numpy.typing import NDArray

from train_jobs.evaluation.errors import EvaluationError

UNIT = 2.0**-32
_LARGEST = 2.0**30  # so that one score is below 2**62 units
_BLOCK = 2**20


def exact_sum(values: NDArray[np.floating], what: str) -> int:
    """The sum of ``values`` in units of 2**-32; EvaluationError naming ``what`` when one is not finite, or huge."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    wrong = ~(np.abs(flat) < _LARGEST)
    if wrong.any():
        raise EvaluationError(
            f"evaluation: the {what} of {int(wrong.sum())} of {flat.size} predictions is not a usable number "
            f"(the first is {flat[wrong][0]}); the model's weights or its precision are at fault"
        )
    blocks = (np.rint(flat[at : at + _BLOCK] / UNIT).astype(np.int64) for at in range(0, flat.size, _BLOCK))
    return sum(_sum(block) for block in blocks)


def _sum(units: NDArray[np.int64]) -> int:
    """Without overflow: the two halves of every number are added apart."""
    high, low = units >> 32, units & 0xFFFFFFFF
    return (int(high.sum()) << 32) + int(low.sum())


def as_float(units: int) -> float:
    """A sum in plain numbers."""
    return units * UNIT
