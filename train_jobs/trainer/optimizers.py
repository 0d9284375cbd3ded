"""An optimizer spec and named parameters in, torch optimizers out, with their states by parameter name."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from cluster.errors import PlanError
from train_jobs.trainer.muon import Muon as MuonOptimizer
from train_jobs.trainer.spec import Adam, Muon, OptimizerSpec, RmsProp, Sgd

Parameters = Mapping[str, nn.Parameter]


class Optimizers:
    """The optimizers of one model, stepped together; each parameter belongs to exactly one of them."""

    def __init__(self, spec: OptimizerSpec, parameters: Parameters, *, layer_matrices: frozenset[str]) -> None:
        """``layer_matrices`` names the matrices of the model's layers, which Muon takes for itself."""
        self._lr = spec.lr
        self._parameters = parameters
        self._optimizers = _build(spec, parameters, layer_matrices)

    def step(self, learning_rate_factor: float) -> float:
        """One update of all parameters; returns the learning rate it was made with."""
        rate = self._lr * learning_rate_factor
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):  # torchao compiles its step with the rate as an input
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            optimizer.step()
        return rate

    def states(self) -> dict[str, torch.Tensor]:
        """Every state tensor as ``parameter/state``, shared with the optimizer. None before the first step."""
        return {
            f"{name}/{key}{part}": tensor
            for name, parameter in self._parameters.items()
            for optimizer in self._optimizers
            for key, value in optimizer.state.get(parameter, {}).items()
            for part, tensor in _plain_parts(value)
        }

    def prepare_states(self, shapes: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, torch.Tensor]:
        """Empty states of the given whole shapes and dtypes, by ``parameter/state``, to be loaded into.

        Those of a parameter's own shape are cut over workers as it is. Names of parameters that this worker does
        not have are left out.
        """
        owners = {id(p): o for o in self._optimizers for group in o.param_groups for p in group["params"]}
        for name, (shape, dtype) in shapes.items():
            parameter_name, _, key = name.rpartition("/")
            parameter = self._parameters.get(parameter_name)
            if parameter is None:
                continue
            optimizer = owners[id(parameter)]
            if "." in key:
                whole, _, _ = key.partition(".")
                optimizer.state[parameter].setdefault(whole, _low_bit_zeros(optimizer, parameter, whole))
                continue
            like = parameter.detach() if shape == parameter.shape else torch.empty(shape)
            optimizer.state[parameter][key] = torch.zeros_like(like, dtype=dtype)
        return self.states()


def _plain_parts(value: object) -> list[tuple[str, torch.Tensor]]:
    """A state as plain tensors: itself, or what a low-bit tensor is made of, each with its name's ending."""
    if not isinstance(value, torch.Tensor):
        return []
    if isinstance(value, DTensor) or not hasattr(value, "__tensor_flatten__"):
        return [("", value)]
    names, _ = value.__tensor_flatten__()
    return [(f".{name}", getattr(value, name)) for name in names]


def _low_bit_zeros(optimizer: Any, parameter: nn.Parameter, key: str) -> torch.Tensor:
    """An empty state as torchao's optimizers make it: signed for the mean, unsigned for the mean square."""
    zeros: torch.Tensor = optimizer._new_buffer(parameter.detach(), key == "exp_avg")
    return zeros


def _build(spec: OptimizerSpec, parameters: Parameters, layer_matrices: frozenset[str]) -> list[Optimizer]:
    match spec:
        case Sgd():
            groups = _decay_groups(parameters, spec.weight_decay)
            return [torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov)]
        case RmsProp():
            groups = _decay_groups(parameters, spec.weight_decay)
            rms = torch.optim.RMSprop(groups, lr=spec.lr, alpha=spec.alpha, eps=spec.eps, momentum=spec.momentum)
            return [rms]
        case Adam():
            return [_adam(spec, parameters)]
        case Muon():
            rest = {name: parameter for name, parameter in parameters.items() if name not in layer_matrices}
            matrices = [parameter for name, parameter in parameters.items() if name in layer_matrices]
            found: list[Optimizer] = []
            if rest:
                groups = _decay_groups(rest, spec.weight_decay)
                found.append(torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps))
            if matrices:
                found.append(MuonOptimizer(matrices, spec))
            return found


def _adam(spec: Adam, parameters: Parameters) -> Optimizer:
    settings: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps}
    groups = _decay_groups(parameters, spec.weight_decay)
    if spec.kind == "adam":
        return torch.optim.Adam(groups, **settings)
    if spec.kind == "adamw":
        return torch.optim.AdamW(groups, **settings)
    try:
        low_bit = importlib.import_module("torchao.optim")
    except ImportError as error:
        raise PlanError(
            "optimizer.kind: adamw8bit needs torchao, which is not installed; "
            "install manta-cluster[low-bit], or choose adamw"
        ) from error
    optimizer: Optimizer = low_bit.AdamW8bit(groups, **settings)
    return optimizer


def _decay_groups(parameters: Parameters, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases, which have one dimension, do not."""
    decayed = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    kept = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
