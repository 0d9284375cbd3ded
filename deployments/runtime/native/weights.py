"""A checkpoint's tensors into a slice's packed memory: only the slice's own, one at a time.

N output features, K input features.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from deployments.runtime.adapter import LowRank, adapter_of, read_beside
from deployments.runtime.native.architecture import Architecture, NotNativeError
from deployments.runtime.native.library import Handle, NormPart, Part
from deployments.runtime.quantize import Quantization, quantize, quantized_bits
from deployments.runtime.settings import StageSlice

_MATRICES = {
    "self_attn.q_proj": Part.QUERY,
    "self_attn.k_proj": Part.KEY,
    "self_attn.v_proj": Part.VALUE,
    "self_attn.o_proj": Part.OUTPUT,
    "mlp.gate_proj": Part.GATE,
    "mlp.up_proj": Part.UP,
    "mlp.down_proj": Part.DOWN,
}
_NORMS = {"input_layernorm": NormPart.ATTENTION, "post_attention_layernorm": NormPart.MLP}
_HEAD_NORMS = {"self_attn.q_norm": NormPart.QUERY, "self_attn.k_norm": NormPart.KEY}
_FLOAT32_BYTES = 4
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Checkpoint:
    """The safetensors files of a directory: which tensors there are, and each one on demand.

    Where there is an adapter in the directory, tensors are merged with it.
    """

    def __init__(self, directory: Path, layers: range) -> None:
        """``layers`` are those that will be read; UnsupportedModelError when the adapter does not fit them."""
        self._opened: dict[Path, Any] = {}
        self._adapter = adapter_of(directory)
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        if index.is_file():
            files = json.loads(index.read_text())["weight_map"]
            self._files = {name: directory / file for name, file in files.items()}
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), single)
        else:
            raise NotNativeError(f"{directory} has no model.safetensors")
        if self._adapter is not None:
            self._adapter.check_names(self._files, layers)

    @property
    def names(self) -> Iterable[str]:
        """The tensors there are."""
        return self._files

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, or as the adapter makes it, on the CPU."""
        path = self._files[name]
        if path not in self._opened:
            self._opened[path] = safe_open(path, framework="pt")
        tensor: torch.Tensor = self._opened[path].get_tensor(name)
        return tensor if self._adapter is None else self._adapter.merged(name, tensor)


def head_name(architecture: Architecture) -> str:
    """The tensor that the output head is made of."""
    return EMBEDDING if architecture.ties_head else HEAD


def check_tensors(checkpoint: Checkpoint, architecture: Architecture, part: StageSlice) -> None:
    """Raise NotNativeError when a tensor that the slice needs is not there under its usual name."""
    norms = _NORMS | (_HEAD_NORMS if architecture.has_head_norms else {})
    names = [
        f"model.layers.{layer}.{name}.weight"
        for layer in range(part.start, part.stop)
        for name in (*_MATRICES, *norms)
    ]
    names += [EMBEDDING] if part.is_first else []
    names += [FINAL_NORM, head_name(architecture)] if part.is_last else []
    missing = [name for name in names if name not in checkpoint]
    if missing:
        raise NotNativeError(f"the checkpoint has no tensor {missing[0]}")


def load_weights(
    handle: Handle,
    checkpoint: Checkpoint,
    architecture: Architecture,
    part: StageSlice,
    *,
    quantization: Quantization | None,
    shares_embedding: bool,
) -> None:
    """Pack everything that ``part`` needs; :func:`check_tensors` must have passed. ValueError for a wrong shape."""
    norms = _NORMS | (_HEAD_NORMS if architecture.has_head_norms else {})
    expected = _shapes(architecture)
    for index, layer in enumerate(range(part.start, part.stop)):
        prefix = f"model.layers.{layer}"
        for name, matrix in _MATRICES.items():
            weight = _shaped(checkpoint, f"{prefix}.{name}.weight", expected[matrix])
            _load_matrix(handle, index, matrix, weight, f"{prefix}.{name}.weight", quantization)
            if f"{prefix}.{name}.bias" in checkpoint:
                bias = _float32(_shaped(checkpoint, f"{prefix}.{name}.bias", expected[matrix][:1]))
                handle.call("load_bias", index, matrix, bias.data_ptr(), len(bias))
        for name, norm in norms.items():
            width = architecture.head_dim if name in _HEAD_NORMS else architecture.hidden_size
            _load_norm(handle, index, norm, _shaped(checkpoint, f"{prefix}.{name}.weight", (width,)))
    if part.is_last:
        _load_norm(handle, 0, NormPart.FINAL, _shaped(checkpoint, FINAL_NORM, (architecture.hidden_size,)))
        weight = _shaped(checkpoint, head_name(architecture), expected[Part.HEAD])
        _load_matrix(handle, 0, Part.HEAD, weight, HEAD, quantization)
    if part.is_first and not shares_embedding:
        embedding = _shaped(checkpoint, EMBEDDING, expected[Part.HEAD]).to(torch.bfloat16).contiguous()
        handle.call("load_embedding", embedding.data_ptr())


def load_adapters(
    handle: Handle,
    checkpoint: Checkpoint,
    architecture: Architecture,
    part: StageSlice,
    folders: Mapping[str, Path],
) -> int:
    """Hand over the adapters in ``folders``, numbered in their order; returns how many bytes they take.

    UnsupportedModelError for one that does not fit the checkpoint, or that cannot be beside it.
    """
    handle.call("set_num_adapters", len(folders))
    expected = _shapes(architecture)
    num_values = 0
    for number, folder in enumerate(folders.values()):
        adapter = read_beside(folder, checkpoint.names, range(part.start, part.stop))
        for index, layer in enumerate(range(part.start, part.stop)):
            for name, matrix in _MATRICES.items():
                low_rank = adapter.matrices.get(f"model.layers.{layer}.{name}")
                if low_rank is not None:
                    adapter.check_shape(name, expected[matrix], low_rank.shape)
                    _load_low_rank(handle, number, index, matrix, low_rank)
                    num_values += low_rank.num_values
    return num_values * _FLOAT32_BYTES


def _load_low_rank(handle: Handle, adapter: int, layer: int, matrix: Part, low_rank: LowRank) -> None:
    down_RK, up_NR = _float32(low_rank.down_RK), _float32(low_rank.up_NR)
    handle.call(
        "load_adapter", adapter, layer, matrix, down_RK.data_ptr(), up_NR.data_ptr(), low_rank.scale, len(down_RK),
        len(up_NR), down_RK.shape[1],
    )  # fmt: skip


def _shapes(architecture: Architecture) -> dict[Part, tuple[int, int]]:
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    queries = architecture.num_query_heads * architecture.head_dim
    kv = architecture.num_kv_heads * architecture.head_dim
    return {
        Part.QUERY: (queries, hidden),
        Part.KEY: (kv, hidden),
        Part.VALUE: (kv, hidden),
        Part.OUTPUT: (hidden, queries),
        Part.GATE: (inner, hidden),
        Part.UP: (inner, hidden),
        Part.DOWN: (hidden, inner),
        Part.HEAD: (architecture.vocab_size, hidden),
    }


def _shaped(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = checkpoint.read(name)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but config.json says {shape}")
    return tensor


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32).contiguous()


def _load_norm(handle: Handle, layer: int, part: NormPart, tensor: torch.Tensor) -> None:
    weight = _float32(tensor)
    handle.call("load_norm", layer, part, weight.data_ptr(), len(weight))


def _load_matrix(
    handle: Handle, layer: int, part: Part, weight_NK: torch.Tensor, name: str, quantization: Quantization | None
) -> None:
    num_rows, num_columns = weight_NK.shape
    bits = quantized_bits(name, weight_NK.shape, quantization)
    if bits is None:
        data, scales, minima = weight_NK.to(torch.bfloat16).contiguous(), None, None
    else:
        quantized = quantize(weight_NK, bits=bits)
        data, scales, minima = quantized.q_NK, quantized.scales_NG, quantized.minima_NG
    handle.call(
        "load_matrix", layer, part, data.data_ptr(),
        scales.data_ptr() if scales is not None else None, minima.data_ptr() if minima is not None else None,
        num_rows, num_columns,
    )  # fmt: skip
