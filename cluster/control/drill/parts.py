"""How replicas recovered, by their own account: Prometheus text in, counts and seconds of each part out.

Ray exports a worker's metrics about every ten seconds, so an account is waited for.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.control.drill.judge import Promise

METRIC = "manta_recovery_seconds"
DETECT = "detect"
DETECT_LIMIT_S = 1.0
"""One of the histogram's boundaries, so that what took longer can be told."""

_SAMPLE = re.compile(rf"ray_{METRIC}_(?P<kind>sum|count|bucket)\{{(?P<labels>[^}}]*)\}} (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of all recoveries so far."""

    count: float = 0.0
    seconds: float = 0.0
    """All together."""
    num_fast: float = 0.0
    """Those that took at most ``DETECT_LIMIT_S``."""

    @property
    def mean_s(self) -> float:
        """Seconds of one recovery."""
        return self.seconds / self.count

    def since(self, before: "Part") -> "Part":
        """What was added since ``before``."""
        return Part(
            count=self.count - before.count,
            seconds=self.seconds - before.seconds,
            num_fast=self.num_fast - before.num_fast,
        )


Parts = Mapping[str, Part]
"""By name: detect, spawn, load, connect, recompute."""


def read_parts(exported: str, model: str) -> Parts:
    """The recoveries of all replicas of ``model`` in what Ray's agents export."""
    sums: defaultdict[str, dict[str, float]] = defaultdict(lambda: {"sum": 0.0, "count": 0.0, "bucket": 0.0})
    for match in _SAMPLE.finditer(exported):
        labels = dict(_LABEL.findall(match["labels"]))
        if labels.get("model") == model and float(labels.get("le", DETECT_LIMIT_S)) == DETECT_LIMIT_S:
            sums[labels["part"]][match["kind"]] += float(match["value"])
    return {
        part: Part(count=found["count"], seconds=found["sum"], num_fast=found["bucket"])
        for part, found in sums.items()
    }


def added(before: Parts, after: Parts) -> dict[str, Part]:
    """What each part did between two accounts; parts in which nothing happened are left out."""
    differences = {name: part.since(before.get(name, Part())) for name, part in after.items()}
    return {name: part for name, part in differences.items() if part.count > 0}


def describe_parts(parts: Parts) -> str:
    """Mean seconds of every part, in the order in which they happen."""
    order = (DETECT, "spawn", "load", "connect", "recompute")
    known = sorted(parts, key=lambda name: order.index(name) if name in order else len(order))
    return ", ".join(f"{name} {parts[name].mean_s:.2f} s" for name in known)


def noticed_at_once(detect: Part) -> Promise:
    """Every loss was noticed within ``DETECT_LIMIT_S``."""
    num_late = detect.count - detect.num_fast
    detail = f"{detect.mean_s:.3f} s on average, {num_late:g} of {detect.count:g} took longer than the limit"
    return Promise(text=f"a dead stage is noticed within {DETECT_LIMIT_S:g} s", kept=num_late <= 0, detail=detail)
