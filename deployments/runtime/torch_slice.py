"""A stage's slice on transformers' own modules: a step and activations in, activations or logits out."""

from collections.abc import Sequence

import torch

from deployments.messages import SequenceStep
from deployments.runtime.attention import PagedStep
from deployments.runtime.beside import BesideAdapters
from deployments.runtime.kv_cache import KVCache, lay_out
from deployments.runtime.model import load_stage
from deployments.runtime.settings import RunnerConfig


class TorchSlice:
    """The slice's model with its KV cache. Not thread-safe."""

    def __init__(self, config: RunnerConfig) -> None:
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
        self._beside = BesideAdapters(self.model, config)
        text = self.model.config
        self.kernels = "torch"
        self.dtype = config.dtype
        self.hidden_size: int = text.hidden_size
        self.vocab_size: int = text.vocab_size
        self._cache = KVCache(
            layers=range(config.part.start, config.part.stop),
            num_blocks=config.num_blocks,
            block_tokens=config.block_tokens,
            num_kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            dtype=config.dtype,
            device=config.device,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters this stage holds; a tensor shared by two modules counts once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def compute(
        self, sequences: Sequence[SequenceStep], hidden_TD: torch.Tensor | None, every_row: bool
    ) -> torch.Tensor:
        """Activations [num_tokens, hidden_size] in the model's dtype, or on the last stage logits."""
        layout = lay_out(sequences, self._cache)
        self._beside.begin_step(sequences)
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
            return torch.empty((0, self.vocab_size), device=self._device)
        logits: torch.Tensor = self.model(**inputs, **common, logits_to_keep=rows).logits[0]
        return logits
