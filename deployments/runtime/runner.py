"""One stage at work: a step and hidden states in, hidden states or samples out."""

import importlib
import logging
from collections.abc import Sequence
from typing import Protocol

import torch

from deployments.messages import Sample, SequenceStep, StepInput
from deployments.runtime.grammar import GrammarCompiler
from deployments.runtime.native.architecture import NotNativeError
from deployments.runtime.native.slice import NativeSlice
from deployments.runtime.sample import Sampler
from deployments.runtime.settings import RunnerConfig
from deployments.runtime.support import UnsupportedModelError

logger = logging.getLogger(__name__)


class LoadedSlice(Protocol):
    """A slice of a model with its KV cache; native or torch."""

    dtype: torch.dtype
    """Of the activations that :meth:`compute` returns."""
    hidden_size: int
    vocab_size: int
    kernels: str
    """What computes: ``amx-bf16``, ``amx-int8``, ``amx-int4`` or ``torch``."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory."""

    def compute(
        self, sequences: Sequence[SequenceStep], hidden_TD: torch.Tensor | None, every_row: bool
    ) -> torch.Tensor:
        """Activations, or on the last stage logits."""


def load_slice(config: RunnerConfig) -> LoadedSlice:
    """The slice on native kernels, or on torch where ``config.kernels`` or the model or the machine wants it so.

    The log says which, and why, and warns when quantized weights have to be unpacked for torch. Importing
    transformers takes seconds, so only what needs it does.
    Raises UnsupportedModelError where ``config.kernels`` is native and they cannot be used.
    """
    reason = "kernels is set to torch"
    if config.kernels != "torch":
        try:
            native = NativeSlice(config)
        except NotNativeError as error:
            reason = str(error)
        else:
            logger.info("native kernels, %s, %d threads", native.kernels, config.num_threads)
            return native
    if config.kernels == "native":
        raise UnsupportedModelError(f"native kernels cannot be used: {reason}; set kernels to auto")
    logger.info("torch kernels: %s", reason)
    if config.quantization is not None and config.kernels == "auto":
        logger.warning(
            "%s weights are unpacked to %s, so they take the memory of that, more than was planned",
            config.quantization,
            config.dtype,
        )
    loaded: LoadedSlice = importlib.import_module("deployments.runtime.torch_slice").TorchSlice(config)
    return loaded


class StageRunner:
    """The slice's model with its KV cache and, on the last stage, the sampler. Not thread-safe."""

    def __init__(self, config: RunnerConfig) -> None:
        self._part = config.part
        self.slice = load_slice(config)
        self._grammars = GrammarCompiler(config.directory / "tokenizer.json")
        self._sampler = Sampler(self._grammars)

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states between stages."""
        return self.slice.dtype

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.slice.hidden_size

    @property
    def kernels(self) -> str:
        """What computes: ``amx-bf16``, ``amx-int8``, ``amx-int4`` or ``torch``."""
        return self.slice.kernels

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights this stage holds."""
        return self.slice.weight_bytes

    def forget(self) -> None:
        """Forget every sequence; what the cache holds is never read again."""
        self._sampler = Sampler(self._grammars)

    @torch.inference_mode()
    def run(self, step: StepInput, hidden_TD: torch.Tensor | None) -> torch.Tensor | list[Sample]:
        """Compute one step.

        ``hidden_TD`` [num_tokens, hidden_size] comes from the previous stage (None on the first). Returns the same
        for the next stage, or on the last stage the samples of the sequences that asked for one, in order.
        """
        for sequence_id in step.ended:
            self._sampler.end(sequence_id)
        for start in step.started:
            self._sampler.start(start)
        output = self.compute(step, hidden_TD)
        if not self._part.is_last:
            return output
        wanted = [sequence.sequence_id for sequence in step.sequences if sequence.sample]
        drafts = {sequence.sequence_id: sequence.drafts for sequence in step.sequences if sequence.num_drafts}
        return self._sampler.sample(wanted, output, drafts) if wanted else []

    @torch.inference_mode()
    def compute(self, step: StepInput, hidden_TD: torch.Tensor | None, *, every_row: bool = False) -> torch.Tensor:
        """The model's part of :meth:`run`: activations, or on the last stage logits.

        Logits [num_rows, vocab_size] are of the sequences that asked for a sample, in order, one row for each draft
        more; with ``every_row`` of every token of the step.
        """
        return self.slice.compute(step.sequences, hidden_TD, every_row)
