"""What a step costs besides computing: an engine here, stages in processes of their own that compute nothing.

Prints, for each number of stages, of streams, and each pretended compute time: how long a step takes beyond its
computing, the CPU that replica and stages use per token, and the gap that a stage sees between two computations.
The CPU of the replica includes the text and the queues up to its clients, not the connection to a gateway.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import product

import uvloop
from rich.console import Console
from rich.table import Table

from deployments.messages import Generate, SamplingParams, TokenPrompt
from deployments.replica.engine import Engine, EngineConfig
from deployments.stage.link import StageAddress, StageLink
from tests.support.idle_stage import StageReport, cpu_seconds
from tests.support.tiny_tokenizer import tiny_text

NUM_STAGES = (1, 2)
NUM_STREAMS = (1, 8, 32)
COMPUTE_US = (0, 5000)
NUM_TOKENS = 400
PROMPT_TOKENS = 64
CONFIG = EngineConfig(
    context_tokens=1024, num_blocks=2400, block_tokens=16, max_running=32, max_step_tokens=2048, max_waiting=64
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One point. Times in seconds."""

    num_tokens: int
    wall_s: float
    replica_cpu_s: float
    stages: list[StageReport]


def main() -> None:
    """Measure every point and print the table."""
    table = Table("stages", "streams", "compute us", "step us", "gap p50 us", "gap mean us", "bubble", "CPU us/token")
    for num_stages, compute_us, num_streams in product(NUM_STAGES, COMPUTE_US, NUM_STREAMS):
        measured = uvloop.run(measure(num_stages, num_streams, compute_us / num_stages))
        table.add_row(str(num_stages), str(num_streams), str(compute_us), *cells(measured))
    Console(width=140).print(table)


def cells(measured: Measured) -> list[str]:
    """One row of the table; per stage where there are several."""
    stages, num_tokens = measured.stages, measured.num_tokens
    cpu_us = [measured.replica_cpu_s, *(stage.cpu_s for stage in stages)]
    return [
        f"{measured.wall_s / stages[0].num_steps * 1e6:.0f}",
        " ".join(f"{stage.gap_p50_us:.0f}" for stage in stages),
        " ".join(f"{stage.gap_mean_us:.0f}" for stage in stages),
        " ".join(f"{stage.bubble_s / measured.wall_s:.0%}" for stage in stages),
        " ".join(f"{seconds / num_tokens * 1e6:.0f}" for seconds in cpu_us),
    ]


async def measure(num_stages: int, num_streams: int, stage_us: float) -> Measured:
    """``num_streams`` streams of NUM_TOKENS each through stages that take ``stage_us`` per step."""
    async with stage_processes(num_stages, stage_us) as (addresses, reports):
        link = await StageLink.connect(addresses, step_timeout_s=30.0)
        engine = Engine(CONFIG, tiny_text(), link)
        await engine.start()
        begin, cpu_begin = time.perf_counter(), cpu_seconds()
        await asyncio.gather(*(stream(engine, number) for number in range(num_streams)))
        wall_s, cpu_s = time.perf_counter() - begin, cpu_seconds() - cpu_begin
        await engine.stop()
        await link.close()
    return Measured(num_tokens=num_streams * NUM_TOKENS, wall_s=wall_s, replica_cpu_s=cpu_s, stages=reports)


async def stream(engine: Engine, number: int) -> None:
    """Read one request to its end."""
    request = Generate(
        request_id=f"r{number}",
        prompt=TokenPrompt(token_ids=tuple(2 + (number + i) % 200 for i in range(PROMPT_TOKENS))),
        sampling=SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True),
        max_tokens=NUM_TOKENS,
        deadline_s=300.0,
    )
    async for _ in engine.submit(request):
        pass


@asynccontextmanager
async def stage_processes(
    num_stages: int, stage_us: float
) -> AsyncIterator[tuple[list[StageAddress], list[StageReport]]]:
    """Stages wired in a ring and ready to serve; their reports are in the list at the end."""
    processes = [start_stage(index, num_stages, stage_us) for index in range(num_stages)]
    reports: list[StageReport] = []
    try:
        listening = [json.loads(process.stdout.readline()) for process in processes]
        for index, process in enumerate(processes):
            after = listening[(index + 1) % num_stages] if num_stages > 1 else None
            print(json.dumps(after), file=process.stdin, flush=True)
        for process in processes:
            process.stdout.readline()
        yield [StageAddress(address=address, secret=bytes.fromhex(secret)) for address, secret in listening], reports
        lines = [await asyncio.to_thread(process.stdout.readline) for process in processes]
        reports.extend(StageReport(**json.loads(line)) for line in lines)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def start_stage(index: int, num_stages: int, stage_us: float) -> subprocess.Popen[str]:
    """One stage's process."""
    command = [sys.executable, "-m", "tests.support.idle_stage", str(index), str(num_stages), str(stage_us)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    main()
