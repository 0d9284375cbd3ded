"""Memory of processes over time: their resident sizes, read on this machine, in; growth per minute out."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import linear_regression

import psutil

from cluster.control.drill.judge import Promise

_WARM_UP_SHARE = 0.25
"""Caches and allocators fill at first; the slope is that of what comes after."""
_FLAT_BYTES_PER_MINUTE = 2**20
_SHORTEST_S = 300.0
"""Over less time than this, an allocator's steps look like a slope."""


@dataclass(slots=True)
class Memory:
    """Resident bytes of named processes, sampled again and again."""

    processes: Mapping[str, psutil.Process]
    times_s: list[float] = field(default_factory=list)
    resident_bytes: dict[str, list[int]] = field(default_factory=dict)

    def sample(self) -> None:
        """Add one reading of every process that still runs."""
        self.times_s.append(time.monotonic())
        for name, process in self.processes.items():
            try:
                self.resident_bytes.setdefault(name, []).append(int(process.memory_info().rss))
            except psutil.NoSuchProcess:
                continue

    def growth(self) -> dict[str, int]:
        """Bytes between first and last reading, of the processes that were there all the time."""
        return {name: sizes[-1] - sizes[0] for name, sizes in self._whole().items()}

    def slopes(self) -> dict[str, float]:
        """Bytes per minute after the warm-up; a process that was replaced meanwhile has none."""
        return {name: slope(self.times_s, sizes) for name, sizes in self._whole().items()}

    def _whole(self) -> dict[str, list[int]]:
        return {name: sizes for name, sizes in self.resident_bytes.items() if len(sizes) == len(self.times_s) > 1}

    def is_flat(self) -> Promise:
        """No process grows by more than 1 MiB a minute; only said of long runs."""
        slopes = self.slopes()
        seconds = self.times_s[-1] - self.times_s[0] if self.times_s else 0.0
        kept = seconds < _SHORTEST_S or all(value <= _FLAT_BYTES_PER_MINUTE for value in slopes.values())
        detail = ", ".join(f"{name} {value / 2**20:+.2f} MiB/min" for name, value in slopes.items())
        short = f" (too short a time to tell: {seconds:.0f} s)" if seconds < _SHORTEST_S else ""
        told = (detail or "no process is on this machine") + short
        return Promise(text="memory is flat", kept=kept, detail=told, shown=True)


def slope(times_s: Sequence[float], sizes: Sequence[int]) -> float:
    """Bytes per minute of the least-squares line through all but the first quarter of the readings."""
    start = int(len(times_s) * _WARM_UP_SHARE)
    if len(times_s) - start < 2:
        return 0.0
    return linear_regression(times_s[start:], sizes[start:]).slope * 60
