"""How stages spent a window of time: pages of a metrics exporter in, parts of 1 by kind out. Pure."""

from collections import defaultdict
from collections.abc import Sequence

StageTotals = dict[int, dict[str, float]]
"""Steps and seconds of each kind, by stage."""


def read_stage_totals(text: str) -> StageTotals:
    """``manta_stage_<kind>_total`` of an exporter's page, by stage and kind, summed over everything else."""
    totals: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for line in text.splitlines():
        name, opened, rest = line.partition("{")
        if opened and name.startswith("ray_manta_stage_") and name.endswith("_total"):
            labels, _, value = rest.rpartition("} ")
            kind = name.removeprefix("ray_manta_stage_").removesuffix("_total")
            stage = next(int(each.split('"')[1]) for each in labels.split(",") if each.startswith("stage="))
            totals[stage][kind] += float(value)
    return {stage: dict(kinds) for stage, kinds in totals.items()}


def stage_shares(samples: Sequence[tuple[float, StageTotals]], start_s: float, stop_s: float) -> StageTotals:
    """How each stage spent the window, as parts of 1 by kind; ValueError without samples.

    Stages without a step in the window are left out. Computing and waiting are the whole. ``bubble`` is the part of
    the waiting while the pipeline had work under way, and ``transfer`` runs beside the next step.
    """
    within = [totals for at, totals in samples if start_s <= at < stop_s]
    if len(within) < 2:
        raise ValueError(f"{len(within)} samples lie in the window; it must be longer")
    first, last = within[0], within[-1]
    shares = {}
    for stage, totals in last.items():
        used = {kind: value - first.get(stage, {}).get(kind, 0.0) for kind, value in totals.items()}
        seconds = {kind.removesuffix("_seconds"): value for kind, value in used.items() if kind.endswith("_seconds")}
        whole = seconds.get("compute", 0.0) + seconds.get("wait", 0.0)
        if whole:
            shares[stage] = {kind: value / whole for kind, value in seconds.items()}
    return shares
