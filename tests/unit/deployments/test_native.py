"""Native kernels against transformers in float32: every architecture, cut, width and number format."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deployments.runtime.quantize import Quantization
from deployments.runtime.rounding import round_weights
from tests.support.native_slices import all_logits, load_native, needs_native, random_tokens
from tests.support.tiny_models import save_tiny_model

pytestmark = needs_native

SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 112,
    "head_dim": 32,
    "vocab_size": 330,
    "max_position_embeddings": 512,
}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip
CASES = {
    "llama": ("llama", SHAPE),
    "one wide head": ("llama", SHAPE | {"head_dim": 128, "num_attention_heads": 1, "num_key_value_heads": 1}),
    "eight queries a head": ("llama", SHAPE | {"head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 1}),
    "many queries a head": ("llama", SHAPE | {"head_dim": 16, "num_attention_heads": 48, "num_key_value_heads": 2}),
    "head of 80": ("llama", SHAPE | {"head_dim": 80, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "narrow": ("llama", SHAPE | {"hidden_size": 16, "intermediate_size": 16, "head_dim": 64}),
    "biases": ("llama", SHAPE | {"attention_bias": True, "mlp_bias": True}),
    "linear rope": ("llama", SHAPE | {"rope_parameters": ROPES["linear"]}),
    "llama3 rope": ("llama", SHAPE | {"rope_parameters": ROPES["llama3"]}),
    "yarn rope": ("llama", SHAPE | {"rope_parameters": ROPES["yarn"]}),
    "qwen2": ("qwen2", SHAPE | {"hidden_size": 128, "head_dim": 32}),
    "qwen2 window": ("qwen2", SHAPE | {"hidden_size": 128, "use_sliding_window": True, "sliding_window": 21,
                                       "max_window_layers": 1}),
    "qwen3": ("qwen3", SHAPE),
    "mistral window": ("mistral", SHAPE | {"sliding_window": 21}),
    "mistral": ("mistral", SHAPE | {"sliding_window": None}),
    "smollm3": ("smollm3", SHAPE | {"hidden_size": 128, "no_rope_layer_interval": 2}),
}  # fmt: skip
NUM_TOKENS = 100


def reference_logits(
    directory: Path, tokens: list[int], dtype: torch.dtype, quantization: Quantization | None = None
) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    if quantization is not None:
        round_weights(model.float(), quantization)
    with torch.inference_mode():
        logits: torch.Tensor = model.to(dtype)(torch.tensor([tokens])).logits[0].float()
    return logits


def save(directory: Path, model_type: str, shape: dict) -> None:
    """As users have them: in bfloat16."""
    save_tiny_model(directory, model_type, **shape).to(torch.bfloat16).save_pretrained(directory)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_nearer_to_float32_than_transformers_in_bfloat16(name: str, tmp_path: Path) -> None:
    model_type, shape = CASES[name]
    save(tmp_path, model_type, shape)
    tokens = random_tokens(NUM_TOKENS, vocab_size=330)
    exact = reference_logits(tmp_path, tokens, torch.float32)
    theirs = (reference_logits(tmp_path, tokens, torch.bfloat16) - exact).square().mean().sqrt()
    ours = (all_logits(load_native(tmp_path, [0, 4]), tokens) - exact).square().mean().sqrt()
    assert exact.square().mean().sqrt() > 15 * ours, "the logits are large beside the error"
    assert ours < 1.1 * theirs


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2", "smollm3"])
def test_cuts_change_no_bit(name: str, tmp_path: Path) -> None:
    model_type, shape = CASES[name]
    save(tmp_path, model_type, shape)
    tokens = random_tokens(40, vocab_size=330)
    whole = all_logits(load_native(tmp_path, [0, 4]), tokens)
    for borders in ([0, 3, 4], [0, 1, 2, 4]):
        assert torch.equal(all_logits(load_native(tmp_path, borders), tokens), whole)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "narrow", "head of 80"])
def test_quantized_logits_are_those_of_the_dequantized_weights(
    name: str, quantization: Quantization, tmp_path: Path
) -> None:
    model_type, shape = CASES[name]
    save(tmp_path, model_type, shape)
    tokens = random_tokens(NUM_TOKENS, vocab_size=330)
    exact = reference_logits(tmp_path, tokens, torch.float32, quantization)
    unquantized = (reference_logits(tmp_path, tokens, torch.float32) - exact).square().mean().sqrt()
    for borders in ([0, 4], [0, 2, 4]):
        ours = all_logits(load_native(tmp_path, borders, quantization=quantization), tokens)
        error = (ours - exact).square().mean().sqrt()
        assert error < unquantized / (4 if quantization == "int4" else 1), "less than what quantizing itself costs"
