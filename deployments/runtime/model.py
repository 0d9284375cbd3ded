"""One stage's model: transformers' own modules cut at layer borders, names unchanged, only its tensors read.

An inner stage receives hidden states in place of embeddings.
"""

from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from deployments.runtime import attention
from deployments.runtime.adapter import merge_adapter
from deployments.runtime.cutting import PassThrough, check_passes_hidden_through, plan_parts
from deployments.runtime.loading import load_model
from deployments.runtime.quantize import Quantization
from deployments.runtime.rounding import round_weights
from deployments.runtime.settings import StageSlice
from deployments.runtime.support import check_supported


def load_stage(
    directory: Path,
    part: StageSlice,
    *,
    dtype: torch.dtype,
    device: torch.device,
    context_tokens: int,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The causal language model in ``directory`` with only ``part`` present, on ``device``, ready for inference.

    Reads only the tensors of the slice (safetensors, memory-mapped), merged with an adapter in the directory. With
    ``quantization``, weights have the values of quantized ones. Raises UnsupportedModelError when the architecture
    cannot be cut or quantized, or the adapter is of another model, ValueError when the checkpoint lacks a tensor.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    num_stages = 1 if part.is_first and part.is_last else 2
    check_supported(config, context_tokens=context_tokens, num_stages=num_stages)
    cut_class = _cut_class(config, part)
    model = load_model(cut_class, directory, config, dtype=dtype, device=device, attention=attention.NAME)
    merge_adapter(directory, model, range(part.start, part.stop))
    if quantization is not None:
        round_weights(model, quantization)
    if not part.is_first:
        check_passes_hidden_through(model, dtype=dtype, device=device)
    return cast(PreTrainedModel, model)


def _cut_class(config: PretrainedConfig, part: StageSlice) -> type[PreTrainedModel]:
    """A subclass of the model's class that drops foreign modules as it is built, before any weight is read."""
    whole = AutoModelForCausalLM._model_mapping[type(config)]

    class CutModel(whole):  # type: ignore[misc,valid-type]
        _keys_to_ignore_on_load_unexpected = (r".*",)  # the other stages' tensors

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            _cut(self, part)

    CutModel.__name__ = whole.__name__
    return CutModel


def _cut(model: PreTrainedModel, part: StageSlice) -> None:
    base = model.base_model
    before, layers, after = plan_parts(base)
    stack = cast(nn.ModuleList, getattr(base, layers))
    for index in range(len(stack)):
        if not part.start <= index < part.stop:
            stack[index] = PassThrough()
    shares_embedding = part.is_last and model.config.tie_word_embeddings
    if not part.is_first and not shares_embedding:
        for name in before:
            setattr(base, name, PassThrough())
    if not part.is_last:
        for name in after:
            setattr(base, name, PassThrough())
        model.set_output_embeddings(nn.Identity())
        model.all_tied_weights_keys = {}
