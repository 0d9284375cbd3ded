"""The Ray actor around one stage: placed by Ray, loaded once, then its loop runs beside it on a thread of its own."""

import asyncio
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from cluster.control.code import check_code_digest
from cluster.registry.materialize import materialize
from cluster.registry.store import Registry

from cluster.plan.types import ModelAppArgs
from deployments.runtime.encoder import EncoderRunner
from deployments.runtime.model import DTYPES, StageSlice
from deployments.runtime.runner import RunnerConfig, StageRunner
from deployments.stage.link import StageAddress
from deployments.stage.telemetry import StageTelemetry
from deployments.stage.worker import StagePosition, StageWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDescription:
    """What a stage says of itself."""

    index: int
    layers: tuple[int, int]
    node_id: str
    pid: int
    resident_bytes: int
    weight_bytes: int
    state: str


class StageActor:
    """One slice of one replica. ``start``, ``connect_next``, then it serves; it ends when its replica does."""

    def __init__(self, args: ModelAppArgs, index: int) -> None:
        self._args = args
        self._plan = args.stages[index]
        self._state = "starting"
        self._runner: StageRunner | EncoderRunner | None = None
        self._worker: StageWorker | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stage-loop", daemon=True)
        self._thread.start()

    def start(self) -> StageAddress:
        """Load the slice and listen; raises what the registry, the runtime or the system says is wrong."""
        check_code_digest(self._args.code_digest)
        self._state = "loading"
        torch.set_num_threads(self._args.threads_per_stage)
        registry = Registry(self._args.storage)
        directory = materialize(registry, registry.get(self._args.model, self._args.version))
        self._runner = self._load(directory)
        address, secret = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self._state = "ready"
        return StageAddress(address=address, secret=secret)

    def _load(self, directory: Path) -> StageRunner | EncoderRunner:
        dtype, device = DTYPES[self._args.dtype], torch.device(self._args.device)
        if self._args.task == "embed":
            return EncoderRunner(directory, dtype=dtype, device=device)
        part = StageSlice(
            start=self._plan.layer_start,
            stop=self._plan.layer_stop,
            is_first=self._plan.has_embedding,
            is_last=self._plan.has_head,
        )
        return StageRunner(
            RunnerConfig(
                directory=directory,
                part=part,
                dtype=dtype,
                device=device,
                context_tokens=self._args.context_tokens,
                num_blocks=self._args.num_blocks,
                block_tokens=self._args.block_tokens,
            )
        )

    async def _listen(self) -> tuple[str, bytes]:
        telemetry = StageTelemetry(model=self._args.model, version=self._args.version, stage=self._plan.index)
        position = StagePosition(
            index=self._plan.index, is_first=self._plan.has_embedding, is_last=self._plan.has_head
        )
        assert self._runner is not None
        self._worker = StageWorker(self._runner, position, on_step=telemetry.observe)
        return await self._worker.start(ray.util.get_node_ip_address())

    def connect_next(self, after: StageAddress) -> None:
        """Connect to the stage after this one."""
        assert self._worker is not None
        self._call(self._worker.connect_next(after.address, after.secret))

    def serve(self) -> None:
        """Compute steps until the replica leaves; raises what a step raised."""
        assert self._worker is not None
        self._state = "serving"
        try:
            self._call(self._worker.serve())
        finally:
            self._state = "stopped"

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def describe(self) -> StageDescription:
        """Where it runs, what it holds, how it is."""
        return StageDescription(
            index=self._plan.index,
            layers=(self._plan.layer_start, self._plan.layer_stop),
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            resident_bytes=psutil.Process().memory_info().rss,
            weight_bytes=self._runner.weight_bytes if self._runner is not None else 0,
            state=self._state,
        )
