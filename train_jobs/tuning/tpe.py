"""Ranges of settings in, Ray Tune's searcher that draws where good trials were out.

Tree-structured Parzen estimator (Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011), as
Optuna implements it: an extra, imported here alone.
"""

from collections.abc import Mapping
from typing import Any

from cluster.errors import PlanError
from train_jobs.job import SpaceSpec, TuneSpec
from train_jobs.tuning.points import rounded


def make_searcher(spec: TuneSpec) -> Any:
    """A searcher of Ray Tune; PlanError when Optuna is not installed.

    A choice is suggested by its place in the list, as Optuna's categories are plain values; :func:`read_point`
    turns suggestions into values.
    """
    try:
        import optuna  # noqa: PLC0415 (an extra)
        from ray.tune.search.optuna import OptunaSearch  # noqa: PLC0415 (imports optuna)
    except ImportError as error:
        raise PlanError(
            "search: tpe needs optuna, which is not installed; pip install 'manta-cluster[tune]', or write "
            "search: random"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {path: _distribution(values, optuna.distributions) for path, values in spec.space.items()}
    return OptunaSearch(space=space, metric=spec.metric, mode=spec.mode, seed=spec.seed)


def _distribution(space: SpaceSpec, distributions: Any) -> Any:
    if space.kind == "choice":
        return distributions.CategoricalDistribution(list(range(len(space.values))))
    low, high = space.values
    if space.kind == "integer":
        return distributions.IntDistribution(low, high)
    return distributions.FloatDistribution(low, high, log=space.kind == "log_uniform")


def read_point(spec: TuneSpec, suggested: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a suggestion means."""
    return {path: _value(space, suggested[path]) for path, space in spec.space.items()}


def _value(space: SpaceSpec, suggested: Any) -> Any:
    match space.kind:
        case "choice":
            return space.values[suggested]
        case "integer":
            return int(suggested)
        case _:
            return rounded(suggested, space)
