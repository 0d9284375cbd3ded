"""Trained weights in, a directory of safetensors and tokenizer files out, as plain transformers loads it.

What was not trained comes from the base again, so a checkpoint of an adapter is enough.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from cluster.errors import PlanError
from train_jobs.data.tokenizer import TOKENIZER_FILES
from train_jobs.tasks.adapter import write_adapter
from train_jobs.tasks.networks import Network, make_network, quiet, stored_dtype
from train_jobs.tasks.spec import Architecture, Checkpoint, TaskSpec
from train_jobs.trainer.errors import CheckpointError
from train_jobs.trainer.layers import trained_parameters

PREFIX = "network."
"""Of the names of a network's parameters within the module that is trained."""


def export_network(spec: TaskSpec, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write the model with ``weights`` (name in the trained module -> whole tensor) to ``directory``.

    CheckpointError when they are not those of this task. Files that are there stay, unless they are overwritten.
    """
    network = make_network(spec, seed=0)
    _fill(network, {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()})
    directory.mkdir(parents=True, exist_ok=True)
    if network.adapted is not None and spec.adapter is not None and spec.adapter.publish == "adapter":
        assert isinstance(spec.base, Checkpoint), "check_task has refused it"
        write_adapter(network.adapted, spec.base.name, directory)
    else:
        _write_whole(spec, network, directory)
    _copy_tokenizer(spec.tokenizer, directory)


def _fill(network: Network, weights: Mapping[str, torch.Tensor]) -> None:
    expected = trained_parameters(network.module).keys()
    missing = sorted(expected - weights.keys())
    if missing:
        raise CheckpointError(f"export: the checkpoint lacks {', '.join(missing[:5])}; it belongs to another task")
    unknown = network.module.load_state_dict(dict(weights), strict=False).unexpected_keys
    if unknown:
        raise CheckpointError(
            f"export: the checkpoint has {', '.join(sorted(unknown)[:5])}, which this task's model does not have"
        )


def _write_whole(spec: TaskSpec, network: Network, directory: Path) -> None:
    whole = network.module if network.adapted is None else network.adapted.merge_and_unload()
    dtype = _dtype(spec)
    whole.to(dtype)
    whole.config.dtype = dtype
    with quiet():
        whole.save_pretrained(directory)


def _dtype(spec: TaskSpec) -> torch.dtype:
    if spec.export_dtype != "base":
        return torch.float32 if spec.export_dtype == "float32" else torch.bfloat16
    if isinstance(spec.base, Architecture):
        return torch.float32
    return stored_dtype(spec.base)


def _copy_tokenizer(tokenizer: Path, directory: Path) -> None:
    files = [tokenizer / name for name in TOKENIZER_FILES if name != "config.json" and (tokenizer / name).is_file()]
    if not files:
        raise PlanError(f"tokenizer: {tokenizer} holds no tokenizer; prepare the data again")
    for path in files:
        shutil.copyfile(path, directory / path.name)
