"""The compiled library, typed; the other side: ``weights.h``, ``slice.h``, and the C interface in ``slice.cpp``."""

import ctypes
from enum import IntEnum
from typing import Any

from cluster.units import format_bytes
from deployments.runtime.native.build import load_library

_KV_BYTES = 4
"""Of a key and a value in bfloat16."""


class Format(IntEnum):
    """How a matrix is packed."""

    BF16 = 0
    INT8 = 1
    INT4 = 2


class Part(IntEnum):
    """A matrix of a layer, or the output head."""

    QUERY = 0
    KEY = 1
    VALUE = 2
    OUTPUT = 3
    GATE = 4
    UP = 5
    DOWN = 6
    HEAD = 7


class NormPart(IntEnum):
    """A norm's weights."""

    ATTENTION = 0
    MLP = 1
    QUERY = 2
    KEY = 3
    FINAL = 4


class SliceShape(ctypes.Structure):
    """Mirror of ``manta::SliceShape``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in (
            "format", "head_format",
            "num_layers", "hidden_size", "intermediate_size", "vocab_size",
            "num_query_heads", "num_kv_heads", "head_dim",
            "has_embedding", "has_head", "shares_embedding",
            "has_head_norms",
            "num_blocks", "block_tokens", "context_tokens",
            "num_threads",
        )),
        ("norm_epsilon", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
    )  # fmt: skip


class StepArrays(ctypes.Structure):
    """Mirror of ``manta::StepArrays``; the arrays must outlive the call."""

    _fields_ = (
        ("num_sequences", ctypes.c_int32),
        ("num_rows", ctypes.c_int32),
        ("num_samples", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in (
            "first_rows", "positions", "first_blocks", "blocks", "tokens", "sampled_rows", "adapters",
            "hidden_in", "hidden_out", "logits",
        )),
    )  # fmt: skip


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "manta_last_error": (ctypes.c_char_p, ()),
    "manta_create": (_INT, (ctypes.POINTER(SliceShape), ctypes.POINTER(_POINTER))),
    "manta_destroy": (None, (_POINTER,)),
    "manta_load_matrix": (_INT, (_POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, _INT, _INT)),
    "manta_load_bias": (_INT, (_POINTER, _INT, _INT, _POINTER, _INT)),
    "manta_set_num_adapters": (_INT, (_POINTER, _INT)),
    "manta_load_adapter": (
        _INT,
        (_POINTER, _INT, _INT, _INT, _POINTER, _POINTER, ctypes.c_float, _INT, _INT, _INT),
    ),
    "manta_load_norm": (_INT, (_POINTER, _INT, _INT, _POINTER, _INT)),
    "manta_load_embedding": (None, (_POINTER, _POINTER)),
    "manta_load_angles": (None, (_POINTER, _POINTER)),
    "manta_set_layer": (_INT, (_POINTER, _INT, _INT, _INT)),
    "manta_weight_bytes": (ctypes.c_int64, (_POINTER,)),
    "manta_forward": (_INT, (_POINTER, ctypes.POINTER(StepArrays))),
}


class Handle:
    """One slice inside the library, freed with this object. Calls may come from any thread, one at a time."""

    def __init__(self, shape: SliceShape) -> None:
        self._library = load_library()
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self._pointer = ctypes.c_void_p()
        try:
            self._check(self._library.manta_create(shape, self._pointer))
        except MemoryError as error:
            num_tokens = shape.num_blocks * shape.block_tokens
            num_bytes = num_tokens * shape.num_layers * shape.num_kv_heads * shape.head_dim * _KV_BYTES
            raise MemoryError(
                f"the system did not allocate a slice's memory ({error}): its KV cache of {num_tokens} tokens takes "
                f"{format_bytes(num_bytes)}; lower kv_cache.tokens"
            ) from error

    def __del__(self) -> None:
        if getattr(self, "_pointer", None):
            self._library.manta_destroy(self._pointer)

    def call(self, name: str, *arguments: object) -> int:
        """Call ``manta_<name>`` with this slice; raises ValueError or MemoryError with the library's words."""
        result: int = getattr(self._library, f"manta_{name}")(self._pointer, *arguments)
        if _FUNCTIONS[f"manta_{name}"][0] is _INT:
            self._check(result)
        return result

    def _check(self, status: int) -> None:
        if status:
            message = self._library.manta_last_error().decode()
            raise ValueError(message) if status == 1 else MemoryError(message)
