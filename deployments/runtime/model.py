"""One stage's model: transformers' own modules cut at layer borders, names unchanged, only its tensors read.

A layer outside the slice becomes a :class:`PassThrough`, so layer indices, parameter names and everything the
model's own ``forward`` does per layer stay as they are. An inner stage receives hidden states in place of embeddings.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from deployments.runtime import attention
from deployments.runtime.adapter import merge_adapter
from deployments.runtime.quantize import Quantization
from deployments.runtime.rounding import round_weights
from deployments.runtime.settings import StageSlice
from deployments.runtime.support import UnsupportedModelError, check_supported


class PassThrough(nn.Module):
    """Stands where another stage's module would: returns its first argument unchanged."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Hidden states in, the same out."""
        return hidden


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
    transformers_logging.disable_progress_bar()
    model, info = _cut_class(config, part).from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        attn_implementation=attention.NAME,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        device_map={"": device},
    )
    if info["missing_keys"]:
        raise ValueError(f"{directory} lacks the tensors {', '.join(sorted(info['missing_keys']))}")
    model.eval().requires_grad_(False)
    merge_adapter(directory, model, range(part.start, part.stop))
    if quantization is not None:
        round_weights(model, quantization)
    if not part.is_first:
        _check_passes_hidden_through(model, dtype=dtype, device=device)
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
    before, layers, after = _plan_parts(base)
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


def _plan_parts(base: nn.Module) -> tuple[list[str], str, list[str]]:
    """Names of the modules before, of, and after the layer stack, by the class's own pipeline plan."""
    names = [name for name in base.config.base_model_pp_plan if hasattr(base, name)]  # type: ignore[union-attr]
    stacks = [name for name in names if isinstance(getattr(base, name), nn.ModuleList)]
    if len(stacks) != 1:
        raise UnsupportedModelError(
            f"{type(base).__name__}: the pipeline plan names {len(stacks)} layer stacks, not one"
        )
    middle = names.index(stacks[0])
    return names[:middle], stacks[0], names[middle + 1 :]


@torch.inference_mode()
def _check_passes_hidden_through(model: PreTrainedModel, *, dtype: torch.dtype, device: torch.device) -> None:
    """Some architectures scale or shift embeddings in ``forward`` itself; an inner stage would do it twice."""
    base = model.base_model
    before, layers, after = _plan_parts(base)
    kept = {name: getattr(base, name) for name in (layers, *after)}
    setattr(base, layers, nn.ModuleList(PassThrough() for _ in kept[layers]))
    for name in after:
        setattr(base, name, PassThrough())
    probe = torch.ones((1, 2, model.config.hidden_size), dtype=dtype, device=device)
    try:
        out = base(inputs_embeds=probe, position_ids=torch.arange(2, device=device)[None], use_cache=False)
    finally:
        for name, module in kept.items():
            setattr(base, name, module)
    if not torch.equal(out.last_hidden_state, probe):
        raise UnsupportedModelError(
            f"{model.config.model_type} cannot be sharded: its forward changes activations outside "
            f"{', '.join((*before, layers, *after))}; set pipeline.stages to 1"
        )
