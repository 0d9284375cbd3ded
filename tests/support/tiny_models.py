"""Tiny random models of every supported architecture, saved as a user's checkpoint would be."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 12},
    "phi3": {},
    "gemma2": {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16, "tie_word_embeddings": False},
    "gemma3_text": {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16, "tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def tiny_model(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random causal language model of about 100 k parameters, float32, in evaluation mode.

    Weights are wide enough that the most likely token leads by a clear margin.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(_COMMON | ARCHITECTURES.get(model_type, {}) | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4 if "embed" in name else 0.2)
    return model.eval()


def save_tiny_model(directory: Path, model_type: str, **overrides: Any) -> PreTrainedModel:
    """Save :func:`tiny_model` as safetensors; returns it for comparison."""
    model = tiny_model(model_type, **overrides)
    model.save_pretrained(directory)
    return model


def save_tiny_classifier(
    directory: Path, model_type: str, labels: tuple[str, ...], **overrides: Any
) -> PreTrainedModel:
    """A random classifier as ``save_pretrained`` leaves it, float32; returns it for comparison."""
    torch.manual_seed(0)
    names = dict(enumerate(labels))
    common = {"id2label": names, "label2id": {name: index for index, name in names.items()}, "pad_token_id": 0}
    config: PretrainedConfig = AutoConfig.for_model(
        model_type, **(_COMMON | {"num_key_value_heads": 4} | common | overrides)
    )
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    return model.eval()


def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers' own ``generate`` continues with, greedily, ignoring the end-of-sequence token."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[0, len(prompt) :].tolist()
