"""A low-rank adapter's files in; the weights that it makes of its base's, or the addition to one product, out.

Notation: N output features, K input features, R rank, T tokens of a step.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from cluster.registry.adapter import CONFIG_NAME, FOLDER, WEIGHTS_NAME, read_adapter_config
from deployments.runtime.support import UnsupportedModelError

_PREFIX = "base_model.model."
_PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h)\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """What an adapter does to one matrix."""

    down_RK: torch.Tensor
    up_NR: torch.Tensor
    scale: float
    length_N: torch.Tensor | None
    """DoRA: the length of each row."""

    @property
    def num_values(self) -> int:
        """Values of both thin matrices."""
        return self.down_RK.numel() + self.up_NR.numel()

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix that it changes."""
        return len(self.up_NR), self.down_RK.shape[1]

    def to(self, dtype: torch.dtype, device: torch.device) -> "LowRank":
        """The same, to compute with activations of this kind."""
        length_N = None if self.length_N is None else self.length_N.to(device, dtype)
        return LowRank(
            down_RK=self.down_RK.to(device, dtype),
            up_NR=self.up_NR.to(device, dtype),
            scale=self.scale,
            length_N=length_N,
        )

    def merged(self, weight_NK: torch.Tensor) -> torch.Tensor:
        """The adapted matrix, computed in float32 and rounded once to the weight's own dtype."""
        whole_NK = weight_NK.float() + self.scale * (self.up_NR.float() @ self.down_RK.float())
        if self.length_N is not None:
            whole_NK *= (self.length_N.float() / torch.linalg.vector_norm(whole_NK, dim=1))[:, None]
        return whole_NK.to(weight_NK.dtype)

    def addition(self, input_TK: torch.Tensor) -> torch.Tensor:
        """What is to be added to the base's product for these rows; never for DoRA."""
        return (input_TK @ self.down_RK.T) @ self.up_NR.T * self.scale


class Adapter:
    """The tensors of one adapter, by the names of the base's."""

    def __init__(self, folder: Path) -> None:
        """Read what peft wrote; UnsupportedModelError for tensors of a kind that cannot be served."""
        config = read_adapter_config(folder / CONFIG_NAME)
        tensors = load_file(folder / WEIGHTS_NAME)
        self._folder = folder
        self.matrices: dict[str, LowRank] = {}
        """By the module's name."""
        self.whole: dict[str, torch.Tensor] = {}
        """Tensors that take the place of the base's, by their name: a head that was trained with the adapter."""
        modules = {name.removesuffix(part) for name in tensors for part in _PARTS if name.endswith(part)}
        for module in sorted(modules):
            down_RK, up_NR, length_N = (tensors.pop(f"{module}{part}", None) for part in _PARTS)
            if down_RK is None or up_NR is None or (length_N is None) != (config.kind == "lora"):
                raise UnsupportedModelError(f"{folder}: the tensors of {module} are not those of a {config.kind}")
            self.matrices[module.removeprefix(_PREFIX)] = LowRank(
                down_RK=down_RK, up_NR=up_NR, scale=config.scale(len(down_RK)), length_N=length_N
            )
        for name, tensor in tensors.items():
            if "lora_" in name or not name.startswith(_PREFIX):
                raise UnsupportedModelError(f"{folder}: {name} adapts no matrix; publish it merged")
            self.whole[name.removeprefix(_PREFIX)] = tensor

    def merged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The base's tensor ``name`` as the adapter makes it; the same one where it changes nothing."""
        new = self.whole.get(name)
        if new is not None:
            self.check_shape(name, tuple(tensor.shape), tuple(new.shape))
            return new.to(tensor.dtype)
        matrix = self.matrices.get(name.removesuffix(".weight"))
        if matrix is None:
            return tensor
        self.check_shape(name, tuple(tensor.shape), matrix.shape)
        return matrix.merged(tensor)

    def check_shape(self, name: str, actual: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        """Raise UnsupportedModelError unless the base's tensor ``name`` has the shape that the adapter is for."""
        if actual != wanted:
            raise UnsupportedModelError(
                f"{self._folder}: {name} is {actual} in the base, but the adapter is for {wanted}"
            )

    def check_names(self, known: Iterable[str], layers: range | None = None) -> None:
        """Raise UnsupportedModelError where the adapter changes a tensor that is not in ``known``.

        With ``layers``, only what lies in those is looked for, and nothing may lie outside of all layers.
        """
        names = {*self.whole, *(f"{module}.weight" for module in self.matrices)}
        missing = names - set(known)
        if layers is not None:
            outside = sorted(name for name in names if _LAYER.search(name) is None)
            if outside:
                raise UnsupportedModelError(
                    f"{self._folder}: {outside[0]} lies outside of the layers, where a model that generates has no "
                    "adapters here; publish it merged"
                )
            missing = {name for name in missing if _layer_of(name) in layers}
        if missing:
            raise UnsupportedModelError(f"{self._folder}: the base has no {min(missing)}; it adapts another model")


def _layer_of(name: str) -> int | None:
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def adapter_of(directory: Path) -> Adapter | None:
    """The adapter that a materialized version is to be merged with; None for a whole model."""
    folder = directory / FOLDER
    return Adapter(folder) if folder.is_dir() else None


def read_beside(folder: Path, names: Iterable[str], layers: range) -> Adapter:
    """An adapter to be beside its base, whose tensors are ``names``; UnsupportedModelError where it cannot."""
    adapter = Adapter(folder)
    adapter.check_names(names, layers)
    if adapter.whole or any(matrix.length_N is not None for matrix in adapter.matrices.values()):
        raise UnsupportedModelError(f"{folder}: only LoRA can be served beside its base; serve it merged")
    return adapter


@torch.no_grad()
def merge_adapter(directory: Path, model: nn.Module, layers: range | None = None) -> None:
    """Change the weights of ``model``, loaded from ``directory``, in place, as the adapter there says, if any.

    ``layers`` are those that the model has, where it is a slice. UnsupportedModelError when the two do not fit.
    """
    adapter = adapter_of(directory)
    if adapter is None:
        return
    parameters = dict(model.named_parameters())
    adapter.check_names(parameters, layers)
    for name, parameter in parameters.items():
        new = adapter.merged(name, parameter)
        if new is not parameter:
            parameter.copy_(new)
