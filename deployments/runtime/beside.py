"""Adapters beside a model: their rows of a step get the adapters' additions, all others the model's own products.

The weights are those of the base, in memory once. Every adapted matrix gets a hook that adds, for each adapter, the
product of its two thin matrices to the rows of the sequences that named it. Rows are independent of each other, so a
sequence's numbers do not depend on which adapters its company has. Native kernels do the same in ``adapters.h``.
Notation as in :mod:`deployments.runtime.adapter`.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from deployments.messages import SequenceStep
from deployments.runtime.adapter import LowRank, read_beside
from deployments.runtime.settings import RunnerConfig
from deployments.runtime.support import UnsupportedModelError

_EXPERTS = ("num_local_experts", "num_experts")


class BesideAdapters:
    """The adapters of one slice; gives hooks to the modules of ``model``. Not thread-safe."""

    def __init__(self, model: PreTrainedModel, config: RunnerConfig) -> None:
        """Read all adapters of ``config``; UnsupportedModelError for one that cannot be added to this model."""
        self._names = frozenset(config.adapters)
        self._device = config.device
        self._rows: dict[str, torch.Tensor] = {}
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        layers = range(config.part.start, config.part.stop)
        changes: defaultdict[str, dict[str, LowRank]] = defaultdict(dict)
        for adapter_name, folder in config.adapters.items():
            adapter = read_beside(folder, parameters, layers)
            for name, matrix in adapter.matrices.items():
                if name not in modules:
                    continue  # in another stage's layers
                _check_sees_every_row(name, modules[name], model)
                adapter.check_shape(name, tuple(parameters[f"{name}.weight"].shape), matrix.shape)
                changes[name][adapter_name] = matrix.to(config.dtype, config.device)
        for name, matrices in changes.items():
            modules[name].register_forward_hook(self._addition(matrices))

    def _addition(self, matrices: dict[str, LowRank]) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output_1TN: torch.Tensor) -> None:
            for name, rows in self._rows.items():
                if name in matrices:
                    output_1TN[0, rows] += matrices[name].addition(inputs[0][0, rows])

        return add

    def begin_step(self, sequences: Sequence[SequenceStep]) -> None:
        """From now on, these are the rows; ValueError for an adapter that is not here."""
        rows: defaultdict[str, list[int]] = defaultdict(list)
        start = 0
        for sequence in sequences:
            stop = start + sequence.num_tokens
            if sequence.adapter is not None:
                if sequence.adapter not in self._names:
                    raise ValueError(f"sequence {sequence.sequence_id}: no adapter {sequence.adapter!r} here")
                rows[sequence.adapter] += range(start, stop)
            start = stop
        self._rows = {name: torch.tensor(numbers, device=self._device) for name, numbers in rows.items()}


def _check_sees_every_row(name: str, module: nn.Module, model: PreTrainedModel) -> None:
    if not isinstance(module, nn.Linear) or any(getattr(model.config, key, None) for key in _EXPERTS):
        raise UnsupportedModelError(
            f"{model.config.model_type}: {name} cannot have adapters beside it, as it does not see every row of a "
            "step; serve the adapter merged, as a model of its own"
        )
