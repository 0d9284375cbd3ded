"""What the native kernels must know of a decoder: ``config.json`` in, its facts out, or the reason why not."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_LANE = 16
"""Widths must be multiples of this: values in a vector register."""
_DEFAULT_THETA = {"smollm3": 2_000_000.0}


class NotNativeError(Exception):
    """A model, or a machine, cannot use the native kernels; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder of the Llama family. ``windows`` and ``rotates`` have one entry per layer of the whole model."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    ties_head: bool
    has_head_norms: bool
    """Whether each query and key head is normalized before it is rotated."""
    windows: tuple[int | None, ...]
    """How many positions a token sees, itself included; None is all before it."""
    rotates: tuple[bool, ...]
    """Whether a layer's queries and keys are rotated by position."""
    rope: dict[str, Any]
    """``rope_type``, ``rope_theta`` and what the type needs."""


def read_architecture(directory: Path) -> Architecture:
    """Read ``directory/config.json``; raises NotNativeError."""
    config = json.loads((directory / "config.json").read_text())
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise NotNativeError(f"model_type {model_type} is not one of {', '.join(MODEL_TYPES)}")
    try:
        architecture = _read(config, model_type)
    except KeyError as error:
        raise NotNativeError(f"config.json has no {error.args[0]}") from error
    _check(config, architecture)
    return architecture


def _read(config: dict[str, Any], model_type: str) -> Architecture:
    num_heads, num_layers = config["num_attention_heads"], config["num_hidden_layers"]
    num_kv_heads = config["num_key_value_heads"] if model_type != "llama" else config.get("num_key_value_heads")
    return Architecture(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        num_query_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=_head_dim(config, model_type),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        ties_head=config.get("tie_word_embeddings", model_type == "smollm3"),
        has_head_norms=model_type == "qwen3",
        windows=_windows(config, model_type),
        rotates=_rotates(config, model_type),
        rope=_rope(config, model_type),
    )


def _head_dim(config: dict[str, Any], model_type: str) -> int:
    if model_type == "qwen3":
        return int(config["head_dim"])
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _windows(config: dict[str, Any], model_type: str) -> tuple[int | None, ...]:
    num_layers: int = config["num_hidden_layers"]
    if model_type == "mistral":
        return (config["sliding_window"],) * num_layers
    window: int | None = config.get("sliding_window") if config.get("use_sliding_window") else None
    if window is None:
        return (None,) * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in config["layer_types"])


def _rotates(config: dict[str, Any], model_type: str) -> tuple[bool, ...]:
    num_layers: int = config["num_hidden_layers"]
    if model_type != "smollm3":
        return (True,) * num_layers
    interval = config.get("no_rope_layer_interval", 4)
    listed = config.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(num_layers)]
    return tuple(bool(rotates) for rotates in listed)


def _rope(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The parameters in either spelling: ``rope_parameters``, or ``rope_theta`` with ``rope_scaling``."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta") or config.get("rope_theta")
    rope["rope_theta"] = float(theta or _DEFAULT_THETA.get(model_type, 10_000.0))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if rope["rope_type"] in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return rope


def _check(config: dict[str, Any], architecture: Architecture) -> None:
    widths = {
        "head_dim": architecture.head_dim,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.intermediate_size,
    }
    for name, width in widths.items():
        if width % _LANE:
            raise NotNativeError(f"{name} {width} is not a multiple of {_LANE}")
    rope_type = architecture.rope["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise NotNativeError(f"rope type {rope_type} is not one of {', '.join(ROPE_TYPES)}")
    if architecture.rope["partial_rotary_factor"] != 1.0:
        raise NotNativeError("only a part of each head is rotated (partial_rotary_factor)")
    if config.get("hidden_act", "silu") != "silu":
        raise NotNativeError(f"its activation is {config['hidden_act']}, not silu")
    if config.get("quantization_config"):
        raise NotNativeError("its stored weights are quantized")
    if architecture.num_query_heads % architecture.num_kv_heads:
        raise NotNativeError("its query heads are not a multiple of its KV heads")
    if not len(architecture.windows) == len(architecture.rotates) == architecture.num_layers:
        raise NotNativeError("config.json does not describe every layer")
