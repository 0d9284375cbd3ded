"""A network and an adapter's settings in, the network with low-rank additions that alone are trained out.

peft puts the additions into the network in place; names of everything else stay as they are. LoRA: arXiv 2106.09685,
DoRA: arXiv 2402.09353.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cluster.errors import PlanError
from train_jobs.tasks.spec import AdapterSpec
from train_jobs.trainer.layers import repeated_layers

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NAME = "default"
_POOLER = "pooler"


def add_adapter(network: PreTrainedModel, spec: AdapterSpec, *, classifies: bool) -> PeftModel:
    """Put additions into ``network`` and freeze the rest, but for a classifier's head; PlanError names bad targets.

    The result is peft's view of the same network, for :func:`write_adapter` and for merging.
    """
    matrices = _matrices(network)
    targets = _targets(network, matrices, spec)
    heads = _heads(network) if classifies else None
    outside = [
        name
        for name in matrices
        if _matches(name, targets) and not _in_layers(name, network) and not _matches(name, heads or [])
    ]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM,
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_dora=spec.kind == "dora",
        target_modules=targets,
        exclude_modules=outside or None,
        modules_to_save=heads,
        fan_in_fan_out=all(isinstance(matrices[name], Conv1D) for name in matrices if _matches(name, targets)),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # read by peft itself
        adapted: PeftModel = get_peft_model(network, config, adapter_name=_NAME)
    return adapted


class BaseSwitch:
    """Lets a network with an adapter compute as its base does. The modules of the network stay those it has now."""

    def __init__(self, network: nn.Module) -> None:
        self._modules = list(network.modules())
        self._layers = [module for module in self._modules if isinstance(module, BaseTunerLayer)]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within the block additions count nothing, and nothing is dropped out.

        peft's own switch also changes what requires a gradient, which a strategy that cut the weights would not
        expect; ``train()`` walks through all modules, which costs more than a forward pass of a small model.
        """
        training = [module for module in self._modules if module.training]
        _set(training, "training", False)
        _set(self._layers, "_disable_adapters", True)
        try:
            yield
        finally:
            _set(self._layers, "_disable_adapters", False)
            _set(training, "training", True)


def _set(modules: Sequence[nn.Module], name: str, value: bool) -> None:
    for module in modules:
        vars(module)[name] = value


def write_adapter(adapted: PeftModel, base_name: str, directory: Path) -> None:
    """Write ``adapter_config.json`` and the additions, as peft and servers of adapters read them."""
    tensors = get_peft_model_state_dict(adapted, adapter_name=_NAME, save_embedding_layers=False)
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(plain, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config: Any = adapted.peft_config[_NAME]
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.save_pretrained(str(directory))


def _matrices(network: PreTrainedModel) -> dict[str, nn.Module]:
    """Modules that multiply by a matrix, other than the output head, by name."""
    head = network.get_output_embeddings()
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def _targets(network: PreTrainedModel, matrices: dict[str, nn.Module], spec: AdapterSpec) -> list[str]:
    inside = [name for name in matrices if _in_layers(name, network)]
    endings = sorted({name.rpartition(".")[2] for name in inside})
    if spec.targets == "auto":
        if not endings:
            raise PlanError(f"adapter.targets: auto finds no matrix in the layers of {network.config.model_type}")
        return endings
    unknown = [target for target in spec.targets if not any(_matches(name, [target]) for name in inside)]
    if unknown:
        raise PlanError(
            f"adapter.targets: {', '.join(unknown)}: no such matrix in the layers of {network.config.model_type}; "
            f"allowed: {', '.join(endings)}; or write auto"
        )
    return list(spec.targets)


def _heads(network: PreTrainedModel) -> list[str]:
    """Modules outside the backbone, which are new and so are trained whole, and a pooler between."""
    backbone = network.base_model
    heads = [name for name, module in network.named_children() if module is not backbone and [*module.parameters()]]
    pooler = getattr(backbone, _POOLER, None)
    return [*heads, _POOLER] if isinstance(pooler, nn.Module) else heads


def _in_layers(name: str, network: PreTrainedModel) -> bool:
    return any(name.startswith(f"{layer}.") for layer in repeated_layers(network))


def _matches(name: str, endings: list[str]) -> bool:
    """As peft matches names: an ending that begins at a dot, or the whole."""
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
