"""A version that is an adapter is served as its base with the adapter merged in, cut or whole, on any kernels."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from cluster.registry.adapter import FOLDER
from deployments.messages import SequenceStep, StepInput
from deployments.runtime.classifier import ClassifierRunner
from deployments.runtime.support import UnsupportedModelError
from tests.support.local_stages import load_runners
from tests.support.native_slices import load_native, needs_native
from tests.support.tiny_adapter import merge_by_hand, write_adapter
from tests.support.tiny_models import save_tiny_classifier, save_tiny_model

PROMPT = (17, 44, 3, 90, 12, 250, 8, 77, 61, 19, 33)


def laid_out(directory: Path, base: Path, adapter: Path) -> Path:
    """As a registry materializes an adapter."""
    shutil.copytree(base, directory)
    shutil.copytree(adapter, directory / FOLDER)
    return directory


def logits(directory: Path, borders: list[int], **options) -> torch.Tensor:
    hidden = None
    step = StepInput(step=0, sequences=(SequenceStep(0, PROMPT, 0, tuple(range(8)), True),))
    for runner in load_runners(directory, borders, **options):
        hidden = runner.compute(step, hidden, every_row=True)
    return hidden


@pytest.mark.parametrize("dora", [False, True])
def test_merged_at_load_equals_merged_by_hand(dora: bool, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "tuned", tmp_path / "base", dora=dora)
    served = laid_out(tmp_path / "served", tmp_path / "base", adapter)
    expected = logits(merge_by_hand(tmp_path / "merged", tmp_path / "base", adapter), [0, 4])
    assert (expected - logits(tmp_path / "base", [0, 4])).abs().max() > 1, "the adapter was to change something"
    for borders in ([0, 4], [0, 1, 4]):
        torch.testing.assert_close(logits(served, borders), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("dora", [False, True])
def test_merged_at_load_equals_pefts_own_model(dora: bool, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "tuned", tmp_path / "base", dora=dora, rank=3, use_rslora=not dora)
    served = laid_out(tmp_path / "served", tmp_path / "base", adapter)
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(base, adapter)(input_ids=torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits(served, [0, 2, 4]), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_writes_is_read(dora: bool, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "llama")
    settings = LoraConfig(r=4, lora_alpha=8, use_dora=dora, target_modules="all-linear", rank_pattern={"q_proj": 2})
    adapted = get_peft_model(base, settings)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.abs() + 0.2 * torch.rand_like(parameter)
    adapted.save_pretrained(tmp_path / "tuned")
    served = laid_out(tmp_path / "served", tmp_path / "base", tmp_path / "tuned")
    with torch.inference_mode():
        expected = adapted.eval()(input_ids=torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits(served, [0, 2, 4]), expected, atol=2e-4, rtol=1e-4)


@needs_native
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_native_kernels_pack_merged_weights(quantization: str | None, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "llama", hidden_size=64, head_dim=16, num_hidden_layers=2)
    adapter = write_adapter(tmp_path / "tuned", tmp_path / "base")
    served = laid_out(tmp_path / "served", tmp_path / "base", adapter)
    merged = merge_by_hand(tmp_path / "merged", tmp_path / "base", adapter)
    step = (SequenceStep(0, PROMPT, 0, (0,), True),)
    found = []
    for directory in (served, merged, tmp_path / "base"):
        (native,) = load_native(directory, [0, 2], quantization=quantization)
        found.append(native.compute(step, None, every_row=True))
    torch.testing.assert_close(found[0], found[1], atol=0.05, rtol=0)
    assert (found[0] - found[2]).abs().max() > 1


def test_an_adapter_that_fits_another_model_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "llama")
    save_tiny_model(tmp_path / "deeper", "llama", num_hidden_layers=5)
    save_tiny_model(tmp_path / "wider", "llama", intermediate_size=96)
    adapter = write_adapter(tmp_path / "tuned", tmp_path / "deeper")
    with pytest.raises(UnsupportedModelError, match=r"the base has no model\.layers\.4\..*; it adapts another model"):
        load_runners(laid_out(tmp_path / "a", tmp_path / "base", adapter), [0, 5])
    adapter = write_adapter(tmp_path / "tuned", tmp_path / "wider")
    with pytest.raises(UnsupportedModelError, match=r"\.weight is \(32, 64\) in the base, .* for \(32, 96\)"):
        load_runners(laid_out(tmp_path / "b", tmp_path / "base", adapter), [0, 4])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_model.model.lm_head.weight", "lies outside of the layers"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "adapts no matrix"),
        ("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", "not those of a lora"),
    ],
)
def test_parts_that_cannot_be_served_are_refused(name: str, words: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "tuned", tmp_path / "base")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors | {name: np.zeros((320, 32), np.float32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UnsupportedModelError, match=words):
        load_runners(laid_out(tmp_path / "served", tmp_path / "base", adapter), [0, 4])


def test_a_classifiers_head_comes_with_its_adapter(tmp_path: Path) -> None:
    save_tiny_classifier(tmp_path / "base", "bert", ("ham", "spam"))
    adapter = write_adapter(tmp_path / "tuned", tmp_path / "base", targets=("query", "dense"))
    head = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.classifier.weight": head}, adapter / "adapter_model.safetensors")
    merged = merge_by_hand(tmp_path / "merged", tmp_path / "base", adapter)
    whole = load_file(merged / "model.safetensors") | {"classifier.weight": head}
    save_file(whole, merged / "model.safetensors", metadata={"format": "pt"})
    served = laid_out(tmp_path / "served", tmp_path / "base", adapter)
    found = [
        ClassifierRunner(directory, dtype=torch.float32, device=torch.device("cpu")).embed([PROMPT])
        for directory in (served, merged)
    ]
    np.testing.assert_allclose(*found, atol=1e-5)
