"""Real stages without Ray: workers on this event loop, wired by real channels on the loopback."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from deployments.runtime.quantize import Quantization
from deployments.runtime.runner import StageRunner
from deployments.runtime.settings import RunnerConfig, StageSlice
from deployments.stage.link import SILENCE_S, Repair, StageAddress, StageLink
from deployments.stage.worker import EmbedRunner, StagePosition, StageWorker, StepRunner

Reroute = Callable[[tuple[str, int], str], Awaitable[str]]


def load_runners(
    directory: Path,
    borders: Sequence[int],
    *,
    num_blocks: int = 64,
    block_tokens: int = 4,
    dtype: str = "float32",
    device: str = "cpu",
    quantization: Quantization | None = None,
    adapters: Mapping[str, Path] | None = None,
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
                adapters=adapters or {},
            )
        )
        for start, stop in pairwise(borders)
    ]


class LocalStages:
    """Workers over ``runners``, and what a supervisor needs to repair them; the runners keep their weights.

    ``reroute`` gets the place of each connection, ``("replica", stage)`` or ``("stages", stage after)``, and its
    address, and returns the address to call instead.
    """

    def __init__(
        self,
        runners: Sequence[StepRunner | EmbedRunner],
        *,
        step_timeout_s: float = 30.0,
        silence_s: float = SILENCE_S,
        reroute: Reroute | None = None,
    ) -> None:
        self.workers: list[StageWorker] = []
        self.repairs: list[frozenset[int]] = []
        """The suspects of each repair."""
        self._runners = runners
        self._step_timeout_s = step_timeout_s
        self._silence_s = silence_s
        self._reroute = reroute
        self._serving: list[asyncio.Task[None]] = []

    async def start(self) -> StageLink:
        """Wire new workers front to back."""
        last = len(self._runners) - 1
        self.workers = [
            StageWorker(runner, StagePosition(index=index, is_first=index == 0, is_last=index == last))
            for index, runner in enumerate(self._runners)
        ]
        addresses = [await worker.start("127.0.0.1") for worker in self.workers]
        for index, worker in enumerate(self.workers) if last else ():
            after = (index + 1) % len(addresses)
            address, secret = addresses[after]
            await worker.connect_next(await self._address("stages", after, address), secret)
        self._serving = [asyncio.create_task(worker.serve()) for worker in self.workers]
        stages = [
            StageAddress(address=await self._address("replica", index, address), secret=secret)
            for index, (address, secret) in enumerate(addresses)
        ]
        return await StageLink.connect(stages, step_timeout_s=self._step_timeout_s, silence_s=self._silence_s)

    async def _address(self, kind: str, stage: int, address: str) -> str:
        return address if self._reroute is None else await self._reroute((kind, stage), address)

    async def repair(self, suspects: Collection[int]) -> Repair:
        """Forget every sequence and wire anew, without any detour."""
        self.repairs.append(frozenset(suspects))
        self._reroute = None
        await self.stop()
        for runner in self._runners:
            runner.forget()  # type: ignore[union-attr]
        return Repair(link=await self.start(), replaced=(), spawn_s=0.0, load_s=0.0, connect_s=0.0)

    async def stop(self) -> None:
        """End all workers."""
        for worker in self.workers:
            await worker.stop()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)


@contextlib.asynccontextmanager
async def serve_stages(
    runners: Sequence[StepRunner | EmbedRunner], *, step_timeout_s: float = 30.0
) -> AsyncIterator[tuple[StageLink, list[StageWorker]]]:
    """A link to workers that serve ``runners``; everything is closed at the end."""
    stages = LocalStages(runners, step_timeout_s=step_timeout_s)
    link = await stages.start()
    try:
        yield link, stages.workers
    finally:
        await link.close()
        await stages.stop()
