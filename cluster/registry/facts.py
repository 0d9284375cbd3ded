"""Facts of a version for the planner: its ``config.json`` and the headers of its safetensors become ``ModelFacts``.

Parameters are counted from the shapes in the headers, so they are what is in the files, whatever the architecture.
Only the headers are read.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from cluster.errors import RegistryError
from cluster.plan.types import AdapterFacts, ModelFacts
from cluster.registry.adapter import CONFIG_NAME, WEIGHTS_NAME, parse_adapter_config
from cluster.registry.labels import task_mistake
from cluster.registry.manifest import ModelVersion
from cluster.registry.positions import position_offset
from cluster.registry.sources.screen import read_header
from cluster.registry.store import Registry

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embeddings|wte|wpe)\.")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")
_NOT_PARAMETERS = ("position_ids", "inv_freq", "masked_bias")
"""Buffers that old checkpoints store beside the weights."""


@dataclass(slots=True, kw_only=True)
class _Counts:
    """Parameters by place; filled tensor by tensor."""

    layers: dict[int, int]
    embedding: int = 0
    head: int = 0
    other: int = 0


def read_facts(registry: Registry, version: ModelVersion) -> ModelFacts:
    """What planning must know of ``version``; RegistryError naming the key or the number that does not fit.

    Of an adapter, what is to be known of its base: the thin matrices are next to nothing beside it.
    """
    if version.adapter_of is not None:
        version = registry.resolve(version.adapter_of)
    whole = json.loads(registry.read_file(version, "config.json"))
    mistake = task_mistake(whole, version.task)
    if mistake is not None:
        raise RegistryError(f"{version.reference} was published for task {version.task}, but {mistake}")
    config = whole.get("text_config") or whole
    numbers = _Numbers(config, version)
    num_layers = numbers.read("num_hidden_layers")
    counts = _count(registry, version, num_layers, nested="text_config" in whole)
    _check_layers(version, counts, num_layers)
    tied = _is_tied(whole, config, counts, version)
    hidden_size = numbers.read("hidden_size")
    num_attention_heads = numbers.read("num_attention_heads")
    return ModelFacts(
        architecture=version.architecture,
        model_type=version.model_type,
        task=version.task,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=numbers.read("vocab_size"),
        max_context_tokens=numbers.read("max_position_embeddings") - position_offset(config),
        num_kv_heads=numbers.read("num_key_value_heads", num_attention_heads),
        head_dim=numbers.read("head_dim", hidden_size // num_attention_heads),
        num_attention_heads=num_attention_heads,
        intermediate_size=numbers.read("intermediate_size"),
        embedding_params=counts.embedding,
        layer_params=tuple(counts.layers[index] for index in range(num_layers)),
        head_params=0 if tied else counts.head,
        tied_head=tied,
        other_params=counts.other,
    )


def read_adapter_facts(registry: Registry, version: ModelVersion) -> AdapterFacts | None:
    """What planning must know of ``version`` as an adapter; None for a whole model."""
    if version.adapter_of is None:
        return None
    config = json.loads(registry.read_file(version, CONFIG_NAME))
    with registry.open_file(version, WEIGHTS_NAME) as file:
        header = read_header(file)
    return AdapterFacts(
        of=version.adapter_of,
        kind=parse_adapter_config(config, version.reference).kind,
        num_params=sum(math.prod(tensor["shape"]) for tensor in header.values()),
    )


class _Numbers:
    """Positive whole numbers of a ``config.json``, by name."""

    def __init__(self, config: dict[str, Any], version: ModelVersion) -> None:
        self._config = config
        self._version = version

    def read(self, key: str, default: int | None = None) -> int:
        """The number under ``key``; ``default`` when it is absent or null and a default is given."""
        value = self._config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RegistryError(
                f"{self._version.reference}: config.json has {key} = {value!r}; planning needs a whole number "
                f"of at least 1 there (model type {self._version.model_type})"
            )
        return value


def _count(registry: Registry, version: ModelVersion, num_layers: int, *, nested: bool) -> _Counts:
    counts = _Counts(layers={})
    for entry in version.files:
        if not entry.path.endswith(".safetensors"):
            continue
        with registry.open_file(version, entry.path) as file:
            try:
                header = read_header(file)
            except ValueError as error:
                raise RegistryError(
                    f"{version.reference}: {entry.path} is not a safetensors file: {error}"
                ) from error
        for name, tensor in header.items():
            in_model = "/" not in entry.path and (not nested or "language_model" in name)
            _add(counts, name, math.prod(tensor["shape"]), num_layers, in_model=in_model)
    return counts


def _add(counts: _Counts, name: str, params: int, num_layers: int, *, in_model: bool) -> None:
    layer = _LAYER.search(name)
    if name.endswith(_NOT_PARAMETERS):
        return
    if in_model and layer is not None and int(layer[1]) < num_layers:
        counts.layers[int(layer[1])] = counts.layers.get(int(layer[1]), 0) + params
    elif in_model and layer is None and _EMBEDDING.search(name):
        counts.embedding += params
    elif layer is None and _HEAD.search(name):
        counts.head += params
    else:
        counts.other += params


def _check_layers(version: ModelVersion, counts: _Counts, num_layers: int) -> None:
    missing = [index for index in range(num_layers) if index not in counts.layers]
    if missing:
        raise RegistryError(
            f"{version.reference}: config.json says num_hidden_layers = {num_layers}, but the weights have no tensor "
            f"of layer {missing[0]} (and {len(missing) - 1} more); the files do not belong together"
        )


def _is_tied(whole: dict[str, Any], config: dict[str, Any], counts: _Counts, version: ModelVersion) -> bool:
    """A generating model without a head tensor shares the embedding's; with one, its config says."""
    if version.task != "generate":
        return False
    return counts.head == 0 or bool(config.get("tie_word_embeddings", whole.get("tie_word_embeddings", False)))
