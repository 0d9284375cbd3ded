"""One stage process whose model computes nothing: it sleeps without the GIL, then answers token 5, or zeros.

``python -m tests.support.idle_stage INDEX NUM_STAGES COMPUTE_US``. Prints its address as JSON, reads the address of
the stage that it connects to, serves one replica, and then prints a :class:`StageReport` as JSON.
"""

import asyncio
import json
import resource
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import uvloop

from deployments.messages import Sample, StageTiming, StepInput
from deployments.stage.worker import StagePosition, StageWorker

HIDDEN_SIZE = 576
TOKEN_ID = 5


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """What one stage saw. A gap is the time between the end of one computation and the start of the next."""

    num_steps: int
    cpu_s: float
    gap_p50_us: float
    gap_mean_us: float
    compute_mean_us: float
    bubble_s: float


class IdleRunner:
    """Implements :class:`deployments.stage.worker.StepRunner`; remembers when it was called."""

    def __init__(self, *, is_last: bool, compute_s: float) -> None:
        self._is_last = is_last
        self._compute_s = compute_s
        self.begins: list[float] = []
        self.ends: list[float] = []

    def run(self, step: StepInput, hidden: torch.Tensor | None) -> torch.Tensor | list[Sample]:
        """Sleep, then answer."""
        self.begins.append(time.perf_counter())
        if self._compute_s:
            time.sleep(self._compute_s)
        result: torch.Tensor | list[Sample]
        if self._is_last:
            result = [Sample(part.sequence_id, TOKEN_ID) for part in step.sequences if part.sample]
        else:
            num_tokens = sum(part.num_tokens for part in step.sequences)
            result = torch.zeros((num_tokens, HIDDEN_SIZE), dtype=torch.bfloat16)
        self.ends.append(time.perf_counter())
        return result

    def report(self, cpu_s: float, bubble_s: float) -> StageReport:
        """Over all steps but the first, which waited for the first request."""
        begins, ends = np.array(self.begins), np.array(self.ends)
        gaps_us = (begins[2:] - ends[1:-1]) * 1e6
        return StageReport(
            num_steps=len(begins),
            cpu_s=cpu_s,
            gap_p50_us=float(np.median(gaps_us)),
            gap_mean_us=float(gaps_us.mean()),
            compute_mean_us=float((ends - begins).mean() * 1e6),
            bubble_s=bubble_s,
        )


async def main(index: int, num_stages: int, compute_us: float) -> None:
    """Serve one replica, then report."""
    runner = IdleRunner(is_last=index == num_stages - 1, compute_s=compute_us / 1e6)
    timings: list[StageTiming] = []
    position = StagePosition(index=index, is_first=index == 0, is_last=index == num_stages - 1)
    worker = StageWorker(runner, position, on_step=timings.append)
    address, secret = await worker.start("127.0.0.1")
    print(json.dumps([address, secret.hex()]), flush=True)
    after = json.loads(await asyncio.to_thread(sys.stdin.readline))
    if after is not None:
        await worker.connect_next(after[0], bytes.fromhex(after[1]))
    begin = cpu_seconds()
    print("wired", flush=True)
    await worker.serve()
    bubble_s = sum(getattr(timing, "bubble_s", 0.0) for timing in timings)
    print(json.dumps(asdict(runner.report(cpu_seconds() - begin, bubble_s))), flush=True)


def cpu_seconds() -> float:
    """CPU that this process has used, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
