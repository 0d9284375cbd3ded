"""Rotary angles: a model's rope parameters in, cosines and sines of every position out.

Types: default (Su et al. 2021), linear (position interpolation, Chen et al. 2023), llama3 (Llama 3.1) and yarn
(Peng et al. 2023), with transformers' names for their parameters. D is the head width, S the number of positions.
"""

import math
from typing import Any

import torch


def rotary_angles(rope: dict[str, Any], *, head_dim: int, num_positions: int) -> torch.Tensor:
    """float32 [S, D]: for each position D / 2 cosines, then D / 2 sines."""
    frequencies, factor = _frequencies(rope, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=1) * factor


def _frequencies(rope: dict[str, Any], head_dim: int) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair, [D / 2], and what cosines and sines are multiplied with."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope["rope_theta"] ** exponents)
    match rope["rope_type"]:
        case "default":
            return frequencies, 1.0
        case "linear":
            return frequencies / rope["factor"], 1.0
        case "llama3":
            return _llama3(rope, frequencies), 1.0
        case "yarn":
            return _yarn(rope, frequencies, head_dim), _yarn_attention_factor(rope)
        case other:
            raise ValueError(f"rope type {other} has no angles here")


def _llama3(rope: dict[str, Any], frequencies: torch.Tensor) -> torch.Tensor:
    """Long waves are stretched by ``factor``, short ones are kept, those between are mixed."""
    context, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = context * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / factor)


def _yarn(rope: dict[str, Any], frequencies: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Pairs that turn often within the trained context are kept, those that hardly turn are stretched."""
    context, theta = rope["original_max_position_embeddings"], rope["rope_theta"]

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(rope.get("beta_fast") or 32)
    high = pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (1.0 - stretched) + frequencies / float(rope["factor"]) * stretched


def _yarn_attention_factor(rope: dict[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return magnitude(1.0)
