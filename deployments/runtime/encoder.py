"""An embedding model: tokenized inputs in, one vector each out. Runs whole, in one stage.

Follows the sentence-transformers layout: ``modules.json`` names a pooling module (its ``config.json`` says how)
and perhaps a normalization; without that file, mean pooling and no normalization. Notation: B inputs, T tokens of
the longest, D width.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from deployments.runtime.adapter import merge_adapter
from deployments.runtime.loading import load_model
from deployments.runtime.padding import pad
from deployments.runtime.support import UnsupportedModelError

Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _mean(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    weights = mask_BT[:, :, None].to(hidden_BTD.dtype)
    return (hidden_BTD * weights).sum(1) / weights.sum(1)


def _first(hidden_BTD: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return hidden_BTD[:, 0]


def _last(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), mask_BT.sum(1) - 1]


def _max(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    return hidden_BTD.masked_fill(~mask_BT[:, :, None].bool(), -torch.inf).amax(1)


_POOLS: dict[str, Pool] = {"mean": _mean, "cls": _first, "lasttoken": _last, "max": _max}
_OLD_KEYS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How token vectors become one: a pooling by name, and whether the result has length one."""

    mode: str
    normalize: bool


def read_pooling(directory: Path) -> Pooling:
    """What ``modules.json`` asks for; UnsupportedModelError for a module or mode that this runtime lacks."""
    modules_file = directory / "modules.json"
    if not modules_file.exists():
        return Pooling(mode="mean", normalize=False)
    mode, normalize = "mean", False
    for module in json.loads(modules_file.read_text()):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            mode = _pooling_mode(json.loads((directory / module["path"] / "config.json").read_text()))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise UnsupportedModelError(f"modules.json: a {kind} module cannot be served")
    return Pooling(mode=mode, normalize=normalize)


def _pooling_mode(config: dict[str, Any]) -> str:
    modes = [name for key, name in _OLD_KEYS.items() if config.get(key)] or [str(config.get("pooling_mode"))]
    if len(modes) != 1 or modes[0] not in _POOLS:
        raise UnsupportedModelError(f"pooling {modes} cannot be served; one of {', '.join(_POOLS)} can")
    return modes[0]


class EncoderRunner:
    """The model with its pooling. Not thread-safe."""

    def __init__(self, directory: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        self._pooling = read_pooling(directory)
        self._device = device
        self._padding_id = getattr(config, "pad_token_id", None) or 0
        self.model = load_model(
            AutoModel, directory, config, dtype=dtype, device=device, attention="sdpa", may_lack="pooler."
        )
        merge_adapter(directory, self.model)

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @torch.inference_mode()
    def embed(self, inputs: Sequence[Sequence[int]]) -> np.ndarray:
        """One float32 vector per tokenized input, shape [len(inputs), D]; inputs must not be empty."""
        ids_BT, mask_BT = pad(inputs, self._padding_id, self._device)
        hidden_BTD = self.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        vectors_BD = _POOLS[self._pooling.mode](hidden_BTD, mask_BT).float()
        if self._pooling.normalize:
            vectors_BD = torch.nn.functional.normalize(vectors_BD, dim=-1)
        return vectors_BD.cpu().numpy()
