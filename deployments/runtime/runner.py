"""One stage at work: a step and hidden states in, hidden states or samples out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from deployments.messages import Sample, StepInput
from deployments.runtime.attention import PagedStep
from deployments.runtime.grammar import GrammarCompiler
from deployments.runtime.kv_cache import KVCache, lay_out
from deployments.runtime.model import StageSlice, load_stage
from deployments.runtime.quantize import Quantization
from deployments.runtime.sample import Sampler
from deployments.runtime.support import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """Everything one stage's runtime must know."""

    directory: Path
    part: StageSlice
    dtype: torch.dtype
    device: torch.device
    context_tokens: int
    num_blocks: int
    block_tokens: int
    quantization: Quantization | None = None
    kernels: Literal["auto", "native", "torch"] = "auto"


class StageRunner:
    """The slice's model with its KV cache and, on the last stage, the sampler. Not thread-safe."""

    def __init__(self, config: RunnerConfig) -> None:
        if config.kernels == "native":
            raise UnsupportedModelError("no native kernels for this processor; set kernels to auto")
        self._part = config.part
        self._device = config.device
        self.model = load_stage(
            config.directory,
            config.part,
            dtype=config.dtype,
            device=config.device,
            context_tokens=config.context_tokens,
            quantization=config.quantization,
        )
        text = self.model.config
        self.kernels = "torch"
        self.dtype = config.dtype
        self.hidden_size: int = text.hidden_size
        self._cache = KVCache(
            layers=range(config.part.start, config.part.stop),
            num_blocks=config.num_blocks,
            block_tokens=config.block_tokens,
            num_kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            dtype=config.dtype,
            device=config.device,
        )
        self._grammars = GrammarCompiler(config.directory / "tokenizer.json")
        self._sampler = Sampler(self._grammars)

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters this stage holds; a tensor shared by two modules counts once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

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
        return self._sampler.sample(wanted, output) if wanted else []

    @torch.inference_mode()
    def compute(self, step: StepInput, hidden_TD: torch.Tensor | None, *, every_row: bool = False) -> torch.Tensor:
        """The model's part of :meth:`run`: activations, or on the last stage logits.

        Logits [num_rows, vocab_size] are of the sequences that asked for a sample, in order; with ``every_row`` of
        every token of the step.
        """
        layout = lay_out(step.sequences, self._cache)
        rows = torch.arange(len(layout.token_ids_T), device=self._device) if every_row else layout.sample_rows
        inputs = (
            {"input_ids": layout.token_ids_T[None]}
            if hidden_TD is None
            else {"inputs_embeds": hidden_TD[None].to(self._device)}
        )
        common = {
            "position_ids": layout.positions_T[None],
            "use_cache": False,
            "paged_step": PagedStep(layout=layout, cache=self._cache),
        }
        if not self._part.is_last:
            output: torch.Tensor = self.model.base_model(**inputs, **common).last_hidden_state[0]
            return output
        if not len(rows):
            self.model.base_model(**inputs, **common)
            return torch.empty((0, self.model.config.vocab_size), device=self._device)
        logits: torch.Tensor = self.model(**inputs, **common, logits_to_keep=rows).logits[0]
        return logits
