"""Who used the cores: the system's busy time, split into the measured server, this client, and everybody else."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuUse:
    """CPU seconds, as totals so far or as the difference of two readings; ``wall_s`` likewise."""

    wall_s: float
    busy_s: float
    """All cores, by anybody; without what the hypervisor took."""
    stolen_s: float
    client_s: float
    server_s: dict[str, float] = field(default_factory=dict)
    """By process: name and pid."""

    def __sub__(self, before: "CpuUse") -> "CpuUse":
        """What was used between two readings."""
        server = {name: used - before.server_s.get(name, 0.0) for name, used in self.server_s.items()}
        return CpuUse(
            wall_s=self.wall_s - before.wall_s,
            busy_s=self.busy_s - before.busy_s,
            stolen_s=self.stolen_s - before.stolen_s,
            client_s=self.client_s - before.client_s,
            server_s={name: used for name, used in server.items() if used > 0},
        )

    @property
    def others_s(self) -> float:
        """Used by processes that belong to neither side of the measurement."""
        return max(0.0, self.busy_s - self.client_s - sum(self.server_s.values()))

    @property
    def others_cores(self) -> float:
        """The same, as a number of cores."""
        return self.others_s / self.wall_s


class CpuClock:
    """Reads :class:`CpuUse`; ``roots`` says, at each reading, which processes are the server's (with descendants)."""

    def __init__(self, roots: Callable[[], Iterable[psutil.Process]]) -> None:
        self._roots = roots

    def read(self) -> CpuUse:
        """Totals so far."""
        times = psutil.cpu_times()
        server = {}
        for process in family(self._roots()):
            try:
                used = process.cpu_times()
                server[f"{process.name()} {process.pid}"] = used.user + used.system
            except psutil.NoSuchProcess:
                continue
        return CpuUse(
            wall_s=time.perf_counter(),
            busy_s=times.user + times.nice + times.system + times.irq + times.softirq,
            stolen_s=times.steal,
            client_s=time.process_time(),
            server_s=server,
        )


def family(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes and all their descendants, each once."""
    found: dict[int, psutil.Process] = {}
    for root in roots:
        try:
            for process in (root, *root.children(recursive=True)):
                found[process.pid] = process
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def started_with(text: str) -> list[psutil.Process]:
    """Processes with ``text`` in their command line; Ray's daemons carry their session's directory there."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(text in word for word in process.info["cmdline"] or ())
    ]
