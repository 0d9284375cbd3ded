"""Quantized weights without quantized kernels: a loaded torch model gets, in place, the values that they stand for.

Answers are those of a quantized model; memory and speed stay those of the model's dtype.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from deployments.runtime.quantize import Bits, Quantization, dequantize, quantize, quantized_bits
from deployments.runtime.support import UnsupportedModelError


@torch.no_grad()
def round_weights(model: PreTrainedModel, quantization: Quantization) -> None:
    """Replace every weight that ``quantization`` covers by its dequantized values, in the model's own dtype.

    An output head that shares the embedding's tensor gets one of its own, because the embedding stays as it is.
    Raises UnsupportedModelError when the layers' weights are not matrices, or have names that are not expected.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding) and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    num_rounded = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() > 2 and ".layers." in name:
            raise UnsupportedModelError(
                f"{model.config.model_type} cannot be quantized: {name} has shape {list(parameter.shape)}, and only "
                "matrices are quantized (no mixtures of experts); remove `quantization`"
            )
        bits = quantized_bits(name, parameter.shape, quantization)
        if bits is not None:
            _round(parameter, bits)
            num_rounded += 1
    if not num_rounded:
        raise UnsupportedModelError(
            f"{model.config.model_type} cannot be quantized: its layers' matrices are not named "
            "`layers.N...weight`; remove `quantization`"
        )


def _round(parameter: torch.Tensor, bits: Bits) -> None:
    parameter.copy_(dequantize(quantize(parameter, bits=bits), parameter.dtype))
