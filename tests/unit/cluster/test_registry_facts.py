"""Facts for the planner: parameter counts come out as transformers counts them, for every family of names."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedModel

from cluster.errors import RegistryError
from cluster.plan.types import ModelFacts
from cluster.registry.facts import read_facts
from cluster.registry.manifest import VersionSpec
from cluster.registry.store import Registry
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_models import save_tiny_classifier, save_tiny_model


def _facts(tmp_path: Path, directory: Path, task: str = "generate") -> ModelFacts:
    config = json.loads((directory / "config.json").read_text())
    registry = Registry(str(tmp_path / "storage"))
    spec = VersionSpec(
        task=task, dtype="float32", architecture=config["architectures"][0], model_type=config["model_type"]
    )
    return read_facts(registry, registry.publish("tiny", directory, spec))


def _total(facts: ModelFacts) -> int:
    return facts.embedding_params + sum(facts.layer_params) + facts.head_params + facts.other_params


def _layer_params(model: PreTrainedModel, index: int) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if f".layers.{index}." in name)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "mixtral", "qwen2", "qwen3_moe", "phi3"])
def test_counts_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", model_type)
    facts = _facts(tmp_path, tmp_path / "model")
    assert _total(facts) == model.num_parameters()
    assert facts.layer_params == tuple(_layer_params(model, index) for index in range(facts.num_layers))
    assert facts.embedding_params == model.get_input_embeddings().weight.numel()
    tied = bool(model.config.tie_word_embeddings)
    assert facts.tied_head == tied
    assert facts.head_params == (0 if tied else model.get_output_embeddings().weight.numel())
    assert (facts.num_kv_heads, facts.max_context_tokens) == (2, 256)
    assert facts.head_dim == (getattr(model.config, "head_dim", None) or 8)


def test_sharded_files_count_the_same(tmp_path: Path) -> None:
    whole = _facts(tmp_path / "a", write_checkpoint(tmp_path / "one"))
    sharded = _facts(tmp_path / "b", write_checkpoint(tmp_path / "three", shards=3))
    assert whole == sharded
    assert whole.head_params == 32 * 8


def test_bert(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=40,
    )
    model = BertModel(config)
    model.save_pretrained(tmp_path / "bert")
    facts = _facts(tmp_path, tmp_path / "bert", task="embed")
    assert _total(facts) == model.num_parameters()
    assert facts.num_layers == 3
    assert len(set(facts.layer_params)) == 1
    assert facts.embedding_params == sum(p.numel() for p in model.embeddings.parameters())
    assert (facts.tied_head, facts.head_params, facts.num_kv_heads, facts.head_dim) == (False, 0, 2, 8)
    assert facts.max_context_tokens == 40


def test_a_classifier_is_counted_with_its_head(tmp_path: Path) -> None:
    model = save_tiny_classifier(tmp_path / "model", "bert", ("ham", "spam", "eggs"))
    facts = _facts(tmp_path, tmp_path / "model", task="classify")
    assert (_total(facts), facts.num_layers, facts.tied_head) == (model.num_parameters(), 4, False)
    with pytest.raises(RegistryError, match="published for task generate, but BertForSequenceClassification"):
        _facts(tmp_path / "other", tmp_path / "model")


def test_config_and_weights_that_do_not_belong_together(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"num_hidden_layers = 3, but the weights have no tensor of layer 2"):
        _facts(tmp_path, write_checkpoint(tmp_path / "model", num_hidden_layers=3))


@pytest.mark.parametrize("value", [None, 0, "many", True])
def test_missing_number_is_named(value: object, tmp_path: Path) -> None:
    with pytest.raises(
        RegistryError, match=r"tiny@v1: config.json has hidden_size = .*; planning needs a whole number"
    ):
        _facts(tmp_path, write_checkpoint(tmp_path / "model", hidden_size=value))


def test_file_that_is_not_safetensors_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    (directory / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(RegistryError, match=r"model.safetensors is not a safetensors file"):
        _facts(tmp_path, directory)
