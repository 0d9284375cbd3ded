"""Whether a model is good enough to be published: requirements and metrics in, what is missed out."""

from collections.abc import Mapping
from typing import Any, Literal


def missed(
    require: Mapping[str, float], modes: Mapping[str, Literal["min", "max"]], metrics: Mapping[str, Any]
) -> tuple[str, ...]:
    """One sentence for each requirement that the metrics do not meet; not a number meets none.

    ``modes`` say whether less or more of a metric is better, and so whether its bound is the most or the least.
    """
    found = (_miss(name, bound, modes[name], metrics) for name, bound in require.items())
    return tuple(sentence for sentence in found if sentence is not None)


def _miss(name: str, bound: float, mode: str, metrics: Mapping[str, Any]) -> str | None:
    if name not in metrics:
        return f"{name} is required, and the evaluation gives {', '.join(metrics) or 'nothing'}"
    value = float(metrics[name])
    if value >= bound if mode == "max" else value <= bound:
        return None
    return f"{name} is {value:.4g}, and at {'least' if mode == 'max' else 'most'} {bound:g} is required"
