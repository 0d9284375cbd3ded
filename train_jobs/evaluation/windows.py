"""A text longer than a model's context: its length in, overlapping windows out that predict every token once."""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Tokens ``start`` to ``stop`` (not included) enter the model; those from ``first_target`` on are targets."""

    start: int
    stop: int
    first_target: int


def windows(num_tokens: int, *, window_tokens: int, stride_tokens: int) -> Iterator[Window]:
    """Windows over ``num_tokens`` tokens, every token but the first a target of exactly one.

    Targets have at least ``window_tokens - stride_tokens`` tokens before them, once that many exist: a small stride
    measures the model as it is in use, with its context full, at the price of more passes. Raises PlanError unless
    1 <= stride_tokens < window_tokens.
    """
    if not 1 <= stride_tokens < window_tokens:
        raise PlanError(
            f"stride_tokens: {stride_tokens}; allowed: 1 to {window_tokens - 1}, less than the window's tokens"
        )
    stop = min(window_tokens, num_tokens)
    first_target = 1
    while first_target < num_tokens:
        yield Window(start=max(0, stop - window_tokens), stop=stop, first_target=first_target)
        first_target, stop = stop, min(stop + stride_tokens, num_tokens)
