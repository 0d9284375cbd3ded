"""Which values a sweep tries: ranges by setting in, one mapping of values for each trial out.

Numbers are rounded to four digits, so that what a table shows is what was used.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from cluster.errors import PlanError
from train_jobs.job import SpaceSpec, TuneSpec

_MAX_DRAWS = 1000
"""Of one more point that is not there yet."""

Point = Mapping[str, Any]


def planned_points(spec: TuneSpec) -> list[dict[str, Any]] | None:
    """The points of all trials, none twice; None for a search that chooses each one by the results before it.

    PlanError when there are fewer points than trials.
    """
    match spec.search:
        case "grid":
            values = [_all_values(path, space) for path, space in spec.space.items()]
            return [dict(zip(spec.space, point, strict=True)) for point in itertools.product(*values)]
        case "random":
            return _drawn(spec)
        case "tpe":
            return None


def _all_values(path: str, space: SpaceSpec) -> Sequence[Any]:
    if space.kind != "choice":
        raise PlanError(
            f"space.{path}: {space.kind} has no values to try one by one; write choice, or search: random"
        )
    return space.values


def _drawn(spec: TuneSpec) -> list[dict[str, Any]]:
    assert spec.trials is not None, "the config refuses a random search without a number of trials"
    random = np.random.default_rng(spec.seed)
    found: dict[bytes, dict[str, Any]] = {}
    for _ in range(spec.trials):
        for _ in range(_MAX_DRAWS):
            point = {path: _draw(space, random) for path, space in spec.space.items()}
            key = msgspec.json.encode(point)
            if key not in found:
                found[key] = point
                break
        else:
            raise PlanError(
                f"trials: {spec.trials}, but the space has about {len(found)} points; set trials to {len(found)}, or "
                "write search: grid"
            )
    return list(found.values())


def _draw(space: SpaceSpec, random: np.random.Generator) -> Any:
    if space.kind == "choice":
        return space.values[int(random.integers(len(space.values)))]
    low, high = space.values
    if space.kind == "integer":
        return int(random.integers(low, high, endpoint=True))
    if space.kind == "uniform":
        return rounded(float(random.uniform(low, high)), space)
    return rounded(math.exp(random.uniform(math.log(low), math.log(high))), space)


def rounded(value: float, space: SpaceSpec) -> float:
    """``value`` in four digits, within the bounds of ``space``."""
    low, high = space.values
    return min(max(float(f"{value:.4g}"), float(low)), float(high))
