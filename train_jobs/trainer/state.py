"""Everything that a run carries from step to step as tensors: by name out to a checkpoint, and back in.

Names are ``model/<parameter>``, ``average/<parameter>`` and ``optimizer/<parameter>/<state>``, the same under every
strategy, and tensors that are cut over workers know how, so a checkpoint can be read at any number of workers.
Random numbers are no state: they are keyed by seed, step and micro-batch.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from train_jobs.trainer.averaging import WeightAverage
from train_jobs.trainer.errors import CheckpointError
from train_jobs.trainer.optimizers import Optimizers


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """What this worker holds; ``parameters`` are the trained ones, ``buffers`` the persistent ones."""

    parameters: Mapping[str, nn.Parameter]
    buffers: Mapping[str, torch.Tensor]
    optimizers: Optimizers
    average: WeightAverage | None

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it by name, sharing memory with what is trained."""
        found = {f"model/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        found |= {f"model/{name}": buffer for name, buffer in self.buffers.items()}
        found |= {f"optimizer/{name}": state for name, state in self.optimizers.states().items()}
        if self.average is not None:
            found |= {f"average/{name}": average for name, average in self.average.averages.items()}
        return found

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Take everything from a checkpoint, whatever strategy wrote it; CheckpointError when it does not fit."""
        saved = saved_tensors(directory)
        prefix = "optimizer/"
        self.optimizers.prepare_states(
            {name[len(prefix) :]: entry for name, entry in saved.items() if name.startswith(prefix)}
        )
        wanted = self.tensors()
        for name, tensor in wanted.items():
            if name not in saved or saved[name][0] != tensor.shape:
                have = tuple(saved[name][0]) if name in saved else "nothing"
                raise CheckpointError(
                    f"{directory}: {name} should have shape {tuple(tensor.shape)}, and the checkpoint has {have}; "
                    "it belongs to another model: use another run directory"
                )
        load_tensors(wanted, directory)


def saved_tensors(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Whole shape and dtype of every tensor of a checkpoint."""
    metadata = FileSystemReader(directory).read_metadata()
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load_tensors(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Fill tensors in place from a checkpoint; every worker reads what it holds, without asking the others."""
    expect_lone_process()
    load_distributed(tensors, storage_reader=FileSystemReader(directory), no_dist=True)


def trained_weights(directory: Path, *, averaged: bool) -> dict[str, torch.Tensor]:
    """The trained parameters and buffers of a checkpoint, whole, on the CPU, by name: what a task exports.

    ``averaged`` takes the moving averages instead of the weights. Frozen parameters are not in it, and tied ones
    are there once, under their first name.
    """
    saved = saved_tensors(directory)
    source = "average/" if averaged else "model/"
    taken = {name: name[len(source) :] for name in saved if name.startswith(source)}
    if averaged and not taken:
        raise CheckpointError(f"{directory} holds no averages; the run had no ema")
    kept = {name: name.removeprefix("model/") for name in saved if name.startswith("model/")}
    missing = {key: name for key, name in kept.items() if name not in taken.values()}  # buffers have no averages
    tensors = {key: torch.empty(saved[key][0], dtype=saved[key][1]) for key in (taken | missing)}
    load_tensors(tensors, directory)
    return {name: tensors[key] for key, name in (taken | missing).items()}


def expect_lone_process() -> None:
    """Keep torch from warning that it reads or writes for one process: that is what is meant here."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
