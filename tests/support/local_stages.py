"""Real stages without Ray: workers on this event loop, wired by real channels on the loopback."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from deployments.runtime.quantize import Quantization
from deployments.runtime.runner import StageRunner
from deployments.runtime.settings import RunnerConfig, StageSlice
from deployments.stage.link import StageAddress, StageLink
from deployments.stage.worker import EmbedRunner, StagePosition, StageWorker, StepRunner


def load_runners(
    directory: Path,
    borders: Sequence[int],
    *,
    num_blocks: int = 64,
    block_tokens: int = 4,
    dtype: str = "float32",
    device: str = "cpu",
    quantization: Quantization | None = None,
) -> list[StageRunner]:
    """One runner per pair of neighbouring ``borders``: [0, 3, 4] is two stages of 3 and 1 layers."""
    return [
        StageRunner(
            RunnerConfig(
                directory=directory,
                part=StageSlice(start=start, stop=stop, is_first=start == 0, is_last=stop == borders[-1]),
                dtype=getattr(torch, dtype),
                device=torch.device(device),
                context_tokens=128,
                num_blocks=num_blocks,
                block_tokens=block_tokens,
                quantization=quantization,
            )
        )
        for start, stop in pairwise(borders)
    ]


@contextlib.asynccontextmanager
async def serve_stages(
    runners: Sequence[StepRunner | EmbedRunner], *, step_timeout_s: float = 30.0
) -> AsyncIterator[tuple[StageLink, list[StageWorker]]]:
    """A link to workers that serve ``runners``; everything is closed at the end."""
    workers = [
        StageWorker(runner, StagePosition(index=index, is_first=index == 0, is_last=index == len(runners) - 1))
        for index, runner in enumerate(runners)
    ]
    addresses = [StageAddress(address=a, secret=s) for a, s in [await w.start("127.0.0.1") for w in workers]]
    for worker, after in zip(workers, addresses[1:] + addresses[:1], strict=True):
        if len(workers) > 1:
            await worker.connect_next(after.address, after.secret)
    serving = [asyncio.create_task(worker.serve()) for worker in workers]
    link = await StageLink.connect(addresses, step_timeout_s=step_timeout_s)
    try:
        yield link, workers
    finally:
        await link.close()
        for worker in workers:
            await worker.stop()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
