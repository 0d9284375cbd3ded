"""The Ray actor around one stage: placed by Ray, loaded once, then its loop runs beside it on a thread of its own."""

import asyncio
import importlib
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from cluster.control.code import check_code_digest
from cluster.plan.types import ModelAppArgs
from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from cluster.telemetry.log import log_to_stderr
from deployments.runtime.runner import StageRunner
from deployments.runtime.settings import DTYPES, RunnerConfig, StageSlice
from deployments.stage.link import StageAddress
from deployments.stage.telemetry import StageTelemetry
from deployments.stage.worker import EmbedRunner, StagePosition, StageWorker


class StageActor:
    """One slice of one replica. ``start``, ``connect_next``, then it serves; it ends when its replica does."""

    def __init__(self, args: ModelAppArgs, index: int) -> None:
        self._args = args
        self._plan = args.stages[index]
        self._runner: StageRunner | EmbedRunner | None = None
        self._worker: StageWorker | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stage-loop", daemon=True)
        self._thread.start()

    def start(self) -> StageAddress:
        """Load the slice and listen; called again, keep the weights, forget every sequence, and listen anew.

        Raises what the registry, the runtime or the system says is wrong.
        """
        begin = time.monotonic()
        if self._runner is None:
            log_to_stderr(model=self._args.model, version=self._args.version, stage=self._plan.index)
            check_code_digest(self._args.code_digest)
            torch.set_num_threads(self._args.threads_per_stage)
            registry = Registry(self._args.storage)
            name = self._args.registry_name or self._args.model
            self._runner = self._load(materialize(registry, registry.get(name, self._args.version)))
        load_s = time.monotonic() - begin
        address, secret = self._call(self._listen())
        process = psutil.Process()
        return StageAddress(
            address=address,
            secret=secret,
            node_id=ray.get_runtime_context().get_node_id(),
            pid=process.pid,
            process_started_at=process.create_time(),
            load_s=load_s,
        )

    def _load(self, directory: Path) -> StageRunner | EmbedRunner:
        dtype, device = DTYPES[self._args.dtype], torch.device(self._args.device)
        if self._args.task == "embed":
            encoder = importlib.import_module("deployments.runtime.encoder")  # and transformers with it: seconds
            runner: EmbedRunner = encoder.EncoderRunner(directory, dtype=dtype, device=device)
            return runner
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
                quantization=self._args.quantization,
                kernels=self._args.kernels,
                num_threads=self._args.threads_per_stage,
            )
        )

    async def _listen(self) -> tuple[str, bytes]:
        if self._worker is not None:
            await self._worker.stop()
        if isinstance(self._runner, StageRunner):
            self._runner.forget()
        telemetry = StageTelemetry(model=self._args.model, version=self._args.version, stage=self._plan.index)
        position = StagePosition(
            index=self._plan.index, is_first=self._plan.has_embedding, is_last=self._plan.has_head
        )
        assert self._runner is not None
        self._worker = StageWorker(self._runner, position, on_step=telemetry.observe)
        return await self._worker.start(ray.util.get_node_ip_address())

    def connect_next(self, after: StageAddress) -> None:
        """Connect to the stage after this one; from the last, to the first."""
        assert self._worker is not None
        self._call(self._worker.connect_next(after.address, after.secret))

    def serve(self) -> None:
        """Compute steps until the replica leaves; raises what a step raised."""
        assert self._worker is not None
        self._call(self._worker.serve())

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
