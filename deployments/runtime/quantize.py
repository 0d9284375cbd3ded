"""What ``quantization: int8 | int4`` means: a weight matrix in, small integers and one scale per group of them out.

    weight[n, k]  ~  q[n, k] * scales[n, k // group_size]

Symmetric (no zero point), one float32 scale per row and group of ``group_size`` columns, rounded half to even. With 8
bits a group is a whole row, so that native kernels sum a row in integers; with 4 bits it is 64 columns. The
definition is pure torch and the only one: native kernels pack what :func:`quantize` returns, the torch path computes
with :func:`dequantize` of it. Which tensors are quantized is :func:`quantized_bits`.

Shapes: N output features, K input features, G = ceil(K / group_size) groups; the last group may be shorter.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Quantization = Literal["int8", "int4"]
Bits = Literal[4, 8]

GROUP_SIZE = 64
"""Columns that share a scale with 4 bits."""
HEAD_BITS: Bits = 8
"""The output head decides between all tokens; it is never coarser than this."""

_LAYER_BITS: dict[Quantization, Bits] = {"int8": 8, "int4": 4}
_LOWEST = {8: -127, 4: -8}
_HIGHEST = {8: 127, 4: 7}

_LAYER_WEIGHT = re.compile(r"(?:^|\.)layers\.\d+\..*\.weight$")
_HEAD_WEIGHT = re.compile(r"(?:^|\.)lm_head\.weight$")
_CHUNK_ELEMENTS = 1 << 18  # rows are worked on in pieces that stay in a core's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """One quantized matrix.

    ``q_NK`` is int8 also for 4 bits (one value a byte), -127 .. 127 for 8 bits and -8 .. 7 for 4 bits.
    ``scales_NG`` is float32, finite, and may be zero or negative.
    """

    q_NK: torch.Tensor
    scales_NG: torch.Tensor
    bits: Bits
    group_size: int


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


def quantize(weight_NK: torch.Tensor, *, bits: Bits, group_size: int | None = None) -> QuantizedWeight:
    """Quantize a matrix; any float dtype, on any device, result on the same device.

    8 bits: scale = absmax / 127. 4 bits: scale = the value of largest magnitude / -8, so that all sixteen levels are
    used. A group of zeros has scale 0. ``group_size`` None is a whole row for 8 bits, 64 for 4 bits. Raises
    ValueError when ``weight_NK`` holds an infinity or NaN.
    """
    num_rows, num_columns = weight_NK.shape
    group_size = group_size or (num_columns if bits == 8 else GROUP_SIZE)
    num_groups = -(-num_columns // group_size)
    q_NK = torch.empty((num_rows, num_columns), dtype=torch.int8, device=weight_NK.device)
    scales_NG = torch.empty((num_rows, num_groups), dtype=torch.float32, device=weight_NK.device)
    chunk = max(1, _CHUNK_ELEMENTS // num_columns)
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        groups = _grouped(weight_NK[rows], group_size)
        scales = _scales(groups, bits)
        q_NK[rows] = _round(groups, scales, bits).flatten(1)[:, :num_columns]
        scales_NG[rows] = scales
    if not scales_NG.isfinite().all():
        raise ValueError("a matrix with infinities or NaN cannot be quantized")
    return QuantizedWeight(q_NK=q_NK, scales_NG=scales_NG, bits=bits, group_size=group_size)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The values that ``weight`` stands for, [N, K]: computed in float32, then rounded to ``dtype``."""
    scales_NK = weight.scales_NG.repeat_interleave(weight.group_size, dim=1)[:, : weight.q_NK.shape[1]]
    return (weight.q_NK.float() * scales_NK).to(dtype)


def _grouped(weight_NK: torch.Tensor, group_size: int) -> torch.Tensor:
    """The matrix in float32 as [N, G, group_size]; the last group is filled up with zeros."""
    padding = -weight_NK.shape[1] % group_size
    padded = torch.nn.functional.pad(weight_NK.float(), (0, padding))
    return padded.view(weight_NK.shape[0], -1, group_size)


def _scales(groups: torch.Tensor, bits: Bits) -> torch.Tensor:
    magnitudes, at = groups.abs().max(dim=-1, keepdim=True)
    if bits == 8:
        return magnitudes[..., 0] / _HIGHEST[8]
    return groups.gather(-1, at)[..., 0] / _LOWEST[4]


def _round(groups: torch.Tensor, scales: torch.Tensor, bits: Bits) -> torch.Tensor:
    """Nearest integers, half to even; zero where the scale is zero."""
    divisors = torch.where(scales == 0, 1.0, scales)[..., None]
    return (groups / divisors).round_().clamp_(_LOWEST[bits], _HIGHEST[bits])
