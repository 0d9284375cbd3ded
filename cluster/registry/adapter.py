"""An adapter's ``adapter_config.json`` in, what serving must know of it out, or the reason why it cannot be served.

An adapter is a version of its own that names the version it adapts (``adapter_of`` in its manifest). Its files are
those that peft writes: thin matrices A [rank, in] and B [out, rank] for some matrices W [out, in] of the base, which
then are W + scale B A (LoRA, arXiv 2106.09685), or the same with each row brought to a learned length (DoRA, arXiv
2402.09353).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.errors import RegistryError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FOLDER = "adapter"
"""Where the two lie in a materialized version; transformers would load an adapter beside a model by itself."""

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "lora_ga")
"""Ways to begin training that leave the base's weights alone."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, {}, []),
    "init_lora_weights": (*_PLAIN_STARTS, None),
}
"""Settings that change what is computed, with the values for which it is what the docstring above says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """How an adapter's tensors change the weights."""

    kind: Literal["lora", "dora"]
    alpha: float
    by_root_of_rank: bool
    """The product is scaled by alpha / sqrt(rank), not by alpha / rank."""

    def scale(self, rank: int) -> float:
        """The factor of the product of two matrices of this rank."""
        return self.alpha / (math.sqrt(rank) if self.by_root_of_rank else rank)


def read_adapter_config(file: Path) -> AdapterConfig:
    """Read ``adapter_config.json``; see :func:`parse_adapter_config`."""
    return parse_adapter_config(json.loads(file.read_text()), str(file))


def parse_adapter_config(config: dict[str, Any], place: str) -> AdapterConfig:
    """The settings in ``config``; RegistryError naming ``place`` and every setting that cannot be served."""
    wrong = [
        f"{key} is {config.get(key)!r}"
        for key, neutral in _NEUTRAL.items()
        if config.get(key, neutral[0]) not in neutral
    ]
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or alpha <= 0:
        wrong.append(f"lora_alpha is {alpha!r}, not a positive number")
    if wrong or alpha is None:
        raise RegistryError(f"{place}: this adapter cannot be served: {'; '.join(wrong)}; publish it merged")
    return AdapterConfig(
        kind="dora" if config.get("use_dora") else "lora",
        alpha=float(alpha),
        by_root_of_rank=bool(config.get("use_rslora")),
    )
