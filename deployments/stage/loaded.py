"""What one stage computes with and answers through, as the plan says.

Torch comes with this module, so the actor imports it when it starts, and a replica never does.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path

import torch

from cluster.plan.types import ModelAppArgs
from deployments.runtime.runner import StageRunner
from deployments.runtime.settings import DTYPES, RunnerConfig, StageSlice
from deployments.stage.telemetry import StageTelemetry
from deployments.stage.worker import EmbedRunner, StagePosition, StageWorker

_VECTOR_RUNNERS = {
    "embed": ("deployments.runtime.encoder", "EncoderRunner"),
    "classify": ("deployments.runtime.classifier", "ClassifierRunner"),
}


def runner_config(
    args: ModelAppArgs, index: int, directory: Path, adapters: Mapping[str, Path] | None = None
) -> RunnerConfig:
    """What stage ``index`` of a generating model loads from the checkpoint in ``directory``, and how it computes."""
    plan = args.stages[index]
    return RunnerConfig(
        directory=directory,
        part=StageSlice(
            start=plan.layer_start, stop=plan.layer_stop, is_first=plan.has_embedding, is_last=plan.has_head
        ),
        dtype=DTYPES[args.dtype],
        device=torch.device(args.device),
        context_tokens=args.context_tokens,
        num_blocks=args.num_blocks,
        block_tokens=args.block_tokens,
        quantization=args.quantization,
        kernels=args.kernels,
        num_threads=args.threads_per_stage,
        adapters=adapters or {},
    )


class LoadedStage:
    """The weights of one stage, and a worker that is renewed whenever the stage begins to listen."""

    def __init__(self, args: ModelAppArgs, index: int, directory: Path, adapters: Mapping[str, Path]) -> None:
        """Load the slice from the checkpoint in ``directory``; raises what the runtime says is wrong.

        ``adapters`` are the folders of those that are served beside the model, by name.
        """
        self._args = args
        self._plan = args.stages[index]
        self._worker: StageWorker | None = None
        torch.set_num_threads(args.threads_per_stage)
        self._runner = self._load(directory, adapters)

    def _load(self, directory: Path, adapters: Mapping[str, Path]) -> StageRunner | EmbedRunner:
        args = self._args
        if args.task == "generate":
            return StageRunner(runner_config(args, self._plan.index, directory, adapters))
        module, name = _VECTOR_RUNNERS[args.task]
        kind = getattr(importlib.import_module(module), name)  # and transformers with it: seconds
        runner: EmbedRunner = kind(directory, dtype=DTYPES[args.dtype], device=torch.device(args.device))
        return runner

    async def listen(self, host: str) -> tuple[str, bytes]:
        """Forget every sequence and listen anew; returns the address and the secret that connects to it."""
        if self._worker is not None:
            await self._worker.stop()
        if isinstance(self._runner, StageRunner):
            self._runner.forget()
        plan = self._plan
        telemetry = StageTelemetry(model=self._args.model, version=self._args.version, stage=plan.index)
        position = StagePosition(index=plan.index, is_first=plan.has_embedding, is_last=plan.has_head)
        self._worker = StageWorker(self._runner, position, on_step=telemetry.observe)
        return await self._worker.start(host)

    @property
    def worker(self) -> StageWorker:
        """Who answers, once :meth:`listen` has been called."""
        assert self._worker is not None, "a stage listens before anything else is asked of it"
        return self._worker
