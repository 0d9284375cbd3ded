"""A task's spec in, its transformers network out: from a directory or random weights, with or without an adapter.

A causal language model for lm, sft and dpo; transformers' own sequence classification model for classify, so that
what is trained is what anybody loads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from cluster.config.jobs_train import JobTask
from cluster.errors import PlanError
from cluster.registry.positions import max_positions
from deployments.runtime.adapter import merge_adapter
from deployments.runtime.support import UnsupportedModelError
from train_jobs.tasks.adapter import add_adapter
from train_jobs.tasks.spec import Architecture, Checkpoint, TaskSpec

_FROM_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """``module`` is what computes; ``adapted`` is peft's view of it, None without an adapter."""

    module: PreTrainedModel
    adapted: PeftModel | None


def read_config(spec: TaskSpec) -> PretrainedConfig:
    """The network's config, with the data's labels; PlanError when there is none such, or it cannot take the data."""
    base = spec.base
    config = _architecture(base, spec) if isinstance(base, Architecture) else stored_config(base)
    text = config.get_text_config()
    if spec.vocab_size > text.vocab_size:
        raise PlanError(
            f"base: its vocabulary has {text.vocab_size} tokens, the data's tokenizer {spec.vocab_size}; prepare the "
            "data with the model's own tokenizer"
        )
    context_tokens = max_positions(text.to_dict())
    if context_tokens is not None and spec.sequence_tokens > context_tokens:
        raise PlanError(
            f"base: its context is {context_tokens} tokens, the data's sequences have {spec.sequence_tokens}; "
            f"prepare the data with sequence_tokens <= {context_tokens}"
        )
    return config


def make_network(spec: TaskSpec, seed: int) -> Network:
    """The whole network in float32 on the CPU, the same for the same ``seed``; what is not trained is frozen.

    PlanError when the directory lacks tensors, or transformers has no such model for the task.
    """
    config = read_config(spec)
    torch.manual_seed(seed)
    with quiet():
        module = _random(spec, config) if isinstance(spec.base, Architecture) else _loaded(spec, spec.base, config)
    return _adapted(spec, module)


def load_language_model(base: Checkpoint) -> PreTrainedModel:
    """A base's causal language model in float32 on the CPU, with its adapter, if it has one, merged.

    PlanError when the directory lacks tensors, or transformers has no such model.
    """
    with quiet():
        return _read_checkpoint(base, stored_config(base), "lm")


def outline(spec: TaskSpec) -> Network:
    """The network without any numbers in it, made in moments, to be counted."""
    config = read_config(spec)
    with torch.device("meta"), quiet():
        return _adapted(spec, _random(spec, config))


def stored_dtype(base: Checkpoint) -> torch.dtype:
    """What the base's own weights are stored in."""
    dtype = stored_config(base).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def label_names(config: PretrainedConfig) -> tuple[str, ...]:
    """Labels in the order of a classifier's outputs."""
    return tuple(config.id2label[number] for number in range(len(config.id2label)))


def _adapted(spec: TaskSpec, module: PreTrainedModel) -> Network:
    if spec.adapter is None:
        return Network(module=module.requires_grad_(True), adapted=None)
    return Network(module=module, adapted=add_adapter(module, spec.adapter, classifies=spec.task == "classify"))


def stored_config(base: Checkpoint) -> PretrainedConfig:
    """The config in a base's directory; PlanError when transformers cannot read it, or its weights are quantized."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(base.directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"base {base.name}: {base.directory} has no config that transformers reads: {error}"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise PlanError(
            f"base {base.name}: its weights are stored quantized, and cannot be trained; give the version that it "
            "was quantized from"
        )
    return config


def _architecture(base: Architecture, spec: TaskSpec) -> PretrainedConfig:
    settings = dict(base.settings)
    model_type = settings.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise PlanError(
            f"base.architecture.model_type: {model_type!r}; allowed: a model type of transformers, such as llama"
        )
    config_class: Any = CONFIG_MAPPING[model_type]
    _check_settings(settings, config_class())
    told: dict[str, Any] = {name: getattr(spec, name) for name in _FROM_TOKENIZER}
    told["pad_token_id"] = None  # the embedding of what pads would not be trained, and it may be a real token
    try:
        config: PretrainedConfig = config_class(**settings, **told)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise PlanError(f"base.architecture: transformers refuses it: {error}") from error
    return config


def _check_settings(settings: dict[str, Any], default: PretrainedConfig) -> None:
    known = default.to_dict().keys() | default.attribute_map.keys() | {"dtype"}
    unknown = sorted(name for name in settings if name not in known)
    if unknown:
        raise PlanError(
            f"base.architecture: {default.model_type} has no {', '.join(unknown)}; it has, among others, "
            f"{', '.join(sorted(name for name in known if not name.startswith('_'))[:40])}"
        )
    given = sorted(name for name in settings if name in (*_FROM_TOKENIZER, "pad_token_id"))
    if given:
        raise PlanError(f"base.architecture: {', '.join(given)}: the data's tokenizer decides it; leave it out")


def _random(spec: TaskSpec, config: PretrainedConfig) -> PreTrainedModel:
    if spec.task == "classify":
        config = _with_labels(spec, config)
    network: PreTrainedModel = _auto_class(spec.task, config).from_config(config, dtype=torch.float32)
    return network


def _loaded(spec: TaskSpec, base: Checkpoint, config: PretrainedConfig) -> PreTrainedModel:
    if spec.task != "classify":
        return _read_checkpoint(base, config, spec.task)
    same_labels = label_names(config) == spec.labels
    network = _read_checkpoint(base, _with_labels(spec, config), "classify")
    if not same_labels:
        _renew_head(network)
    return network


def _read_checkpoint(base: Checkpoint, config: PretrainedConfig, task: JobTask) -> PreTrainedModel:
    """The network with its adapter merged; the head of classify may be missing, or of another size."""
    try:
        network, info = _auto_class(task, config).from_pretrained(
            base.directory,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=task == "classify",
        )
    except OSError as error:
        raise PlanError(f"base {base.name}: {base.directory} cannot be loaded: {error}") from error
    missing = [name for name in info["missing_keys"] if task != "classify" or _in_backbone(name, network)]
    mismatched = [entry[0] for entry in info["mismatched_keys"] if _in_backbone(entry[0], network)]
    if missing or mismatched:
        raise PlanError(f"base {base.name}: {base.directory} lacks {', '.join(sorted([*missing, *mismatched]))}")
    try:
        merge_adapter(base.directory, network)
    except UnsupportedModelError as error:
        raise PlanError(f"base {base.name}: {error}") from error
    whole: PreTrainedModel = network
    return whole


def _in_backbone(name: str, network: PreTrainedModel) -> bool:
    prefix = f"{network.base_model_prefix}."
    return name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")


def _renew_head(network: PreTrainedModel) -> None:
    """Another set of labels has nothing to do with the one that a head in the checkpoint was trained for."""
    std = getattr(network.config.get_text_config(), "initializer_range", 0.02)
    heads = [module for module in network.children() if module is not network.base_model]
    for matrix in (module for head in heads for module in head.modules() if isinstance(module, nn.Linear)):
        nn.init.normal_(matrix.weight, std=std)
        if matrix.bias is not None:
            nn.init.zeros_(matrix.bias)


def _with_labels(spec: TaskSpec, config: PretrainedConfig) -> PretrainedConfig:
    assert spec.labels is not None, "check_task has refused it"
    config.id2label = dict(enumerate(spec.labels))
    config.label2id = {label: number for number, label in enumerate(spec.labels)}
    config.problem_type = "single_label_classification"
    config.get_text_config().pad_token_id = spec.pad_token_id
    return config


def _auto_class(task: JobTask, config: PretrainedConfig) -> Any:
    auto = AutoModelForSequenceClassification if task == "classify" else AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        what = "sequence classification" if task == "classify" else "causal language"
        raise PlanError(f"task {task}: transformers has no {what} model of type {config.model_type}")
    return auto


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and reports of new heads on workers' output."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
