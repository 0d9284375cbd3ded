"""What ``quantization: int8 | int4`` means: a weight matrix in, small integers and the grids they stand on out.

    8 bits:  weight[n, k]  ~  q[n, k] * scales[n]
    4 bits:  weight[n, k]  ~  q[n, k] * scales[n, k // 32] + minima[n, k // 32]

Rounded half to even. With 8 bits a grid is a whole row's and symmetric, so that native kernels sum a row in integers.
With 4 bits it goes from the smallest to the largest of 32 neighbours, which is the grid of GGUF's Q4_1
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): weights that were stored so are found again. The
definition is pure torch and the only one: native kernels pack what :func:`quantize` returns, the torch path computes
with :func:`dequantize` of it. Which tensors are quantized is :func:`quantized_bits`.

Shapes: N output features, K input features, G groups: 1 with 8 bits, ceil(K / 32) with 4; the last may be shorter.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Quantization = Literal["int8", "int4"]
Bits = Literal[4, 8]

GROUP_SIZE = 32
"""Columns that share a grid with 4 bits."""
HEAD_BITS: Bits = 8
"""The output head decides between all tokens; it is never coarser than this."""

_LAYER_BITS: dict[Quantization, Bits] = {"int8": 8, "int4": 4}
_LARGEST: dict[Bits, int] = {8: 127, 4: 15}

_LAYER_WEIGHT = re.compile(r"(?:^|\.)layers\.\d+\..*\.weight$")
_HEAD_WEIGHT = re.compile(r"(?:^|\.)lm_head\.weight$")
_CHUNK_ELEMENTS = 1 << 18  # rows are worked on in pieces that stay in a core's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """One quantized matrix.

    ``q_NK`` is int8 also for 4 bits (one value a byte), -127 .. 127 for 8 bits and 0 .. 15 for 4 bits.
    ``scales_NG`` and ``minima_NG`` (4 bits only) are float32 and finite; a scale may be zero.
    """

    q_NK: torch.Tensor
    scales_NG: torch.Tensor
    minima_NG: torch.Tensor | None
    bits: Bits


def quantized_bits(name: str, shape: Sequence[int], quantization: Quantization | None) -> Bits | None:
    """Bits that the tensor ``name`` of a checkpoint is quantized to; None when it stays as it is.

    Quantized are the matrices of the layers, and the output head to 8 bits. Embedding, norms and biases stay. A head
    that shares the embedding's tensor has no name of its own in the checkpoint: ask with ``lm_head.weight``.
    """
    if quantization is None or len(shape) != 2:
        return None
    if _HEAD_WEIGHT.search(name):
        return HEAD_BITS
    return _LAYER_BITS[quantization] if _LAYER_WEIGHT.search(name) else None


def quantize(weight_NK: torch.Tensor, *, bits: Bits) -> QuantizedWeight:
    """Quantize a matrix; any float dtype, on any device, result on the same device.

    A group of equal values has scale 0 with 4 bits, one of zeros with 8. Raises ValueError when ``weight_NK`` holds
    an infinity or NaN.
    """
    num_rows, num_columns = weight_NK.shape
    num_groups = 1 if bits == 8 else -(-num_columns // GROUP_SIZE)
    q_NK = torch.empty((num_rows, num_columns), dtype=torch.int8, device=weight_NK.device)
    scales_NG = torch.empty((num_rows, num_groups), dtype=torch.float32, device=weight_NK.device)
    minima_NG = torch.empty_like(scales_NG) if bits == 4 else None
    chunk = max(1, _CHUNK_ELEMENTS // num_columns)
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        groups = _grouped(weight_NK[rows], num_groups)
        if minima_NG is not None:
            minima_NG[rows] = groups.amin(dim=-1)
            groups -= minima_NG[rows, :, None]
        scales_NG[rows] = groups.abs().amax(dim=-1) / _LARGEST[bits]
        q_NK[rows] = _round(groups, scales_NG[rows], bits).flatten(1)[:, :num_columns]
    if not scales_NG.isfinite().all():
        raise ValueError("a matrix with infinities or NaN cannot be quantized")
    return QuantizedWeight(q_NK=q_NK, scales_NG=scales_NG, minima_NG=minima_NG, bits=bits)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The values that ``weight`` stands for, [N, K]: computed in float32, then rounded to ``dtype``."""
    num_columns = weight.q_NK.shape[1]
    if weight.minima_NG is None:
        return (weight.q_NK.float() * weight.scales_NG).to(dtype)
    scales_NK = weight.scales_NG.repeat_interleave(GROUP_SIZE, dim=1)[:, :num_columns]
    minima_NK = weight.minima_NG.repeat_interleave(GROUP_SIZE, dim=1)[:, :num_columns]
    return (weight.q_NK.float() * scales_NK + minima_NK).to(dtype)


def _grouped(weight_NK: torch.Tensor, num_groups: int) -> torch.Tensor:
    """A copy in float32 as [N, G, columns of a group]; the last group is filled up with the last column."""
    num_rows, num_columns = weight_NK.shape
    width = num_columns if num_groups == 1 else GROUP_SIZE
    copy = weight_NK.to(torch.float32, copy=True)
    missing = num_groups * width - num_columns
    if missing:
        copy = torch.cat([copy, copy[:, -1:].expand(-1, missing)], dim=1)
    return copy.view(num_rows, num_groups, width)


def _round(groups: torch.Tensor, scales: torch.Tensor, bits: Bits) -> torch.Tensor:
    """Nearest integers, half to even; zero where the scale is zero."""
    divisors = torch.where(scales == 0, 1.0, scales)[..., None]
    return (groups / divisors).round_().clamp_(-_LARGEST[bits], _LARGEST[bits])
