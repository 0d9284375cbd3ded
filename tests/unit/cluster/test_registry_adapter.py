"""An adapter is a version that names its base: published only if it can be served, kept and laid out with it."""

import json
import shutil
import time
from pathlib import Path

import pytest

from cluster.errors import RegistryError
from cluster.registry.adapter import parse_adapter_config
from cluster.registry.facts import read_adapter_facts, read_facts
from cluster.registry.gc import collect
from cluster.registry.manifest import ModelVersion, VersionSpec, parse_manifest
from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from tests.support.tiny_adapter import CONFIG, write_adapter
from tests.support.tiny_checkpoint import write_checkpoint

SPEC = VersionSpec(task="generate", dtype="float32", architecture="LlamaForCausalLM", model_type="llama")
ADAPTER = SPEC.model_copy(update={"adapter_of": "base@v1"})


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "storage"))


@pytest.fixture
def base(registry: Registry, tmp_path: Path) -> ModelVersion:
    return registry.publish("base", write_checkpoint(tmp_path / "base"), SPEC)


def publish(registry: Registry, tmp_path: Path, spec: VersionSpec = ADAPTER, **changes: object) -> ModelVersion:
    return registry.publish("tuned", write_adapter(tmp_path / "tuned", tmp_path / "base", **changes), spec)


def test_its_directory_is_its_bases_with_its_own_texts(
    registry: Registry, base: ModelVersion, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "tuned", tmp_path / "base")
    (tmp_path / "tuned" / "tokenizer_config.json").write_text('{"chat_template": "mine"}')
    (tmp_path / "tuned" / "config.json").write_text("{}")
    version = registry.publish("tuned", tmp_path / "tuned", ADAPTER)
    directory, whole = materialize(registry, version), materialize(registry, base)
    names = {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}
    own = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert names == {file.name for file in whole.iterdir()} | own
    assert "mine" in (directory / "tokenizer_config.json").read_text()
    for shared in ("model.safetensors", "config.json"):
        assert (directory / shared).samefile(whole / shared), "the base's weights take no second copy"
    assert read_facts(registry, version) == read_facts(registry, base)
    facts = read_adapter_facts(registry, version)
    # of q_proj, v_proj and down_proj in two layers, rank 2
    assert (facts.of, facts.kind, facts.num_params) == ("base@v1", "lora", 2 * 2 * ((8 + 8) + (8 + 4) + (16 + 8)))
    assert read_adapter_facts(registry, base) is None


def test_the_same_files_on_another_base_are_another_version(
    registry: Registry, base: ModelVersion, tmp_path: Path
) -> None:
    first = publish(registry, tmp_path)
    other = registry.publish("base", write_checkpoint(tmp_path / "other", seed=1), SPEC)
    second = publish(registry, tmp_path, ADAPTER.model_copy(update={"adapter_of": other.reference}))
    assert (first.version, second.version, publish(registry, tmp_path)) == ("v1", "v2", first)
    assert parse_manifest(second.to_json(), "here") == second


def test_a_base_is_kept_for_its_adapters(registry: Registry, base: ModelVersion, tmp_path: Path) -> None:
    version = publish(registry, tmp_path)
    registry.set_alias("tuned", "latest", version.version, reason="")

    def run() -> tuple[str, ...]:
        return collect(registry, keep_last=0, now=lambda: time.time() + 86400).versions

    assert run() == ()
    registry.set_alias("tuned", "latest", publish(registry, tmp_path, seed=1).version, reason="")
    registry.set_alias("tuned", "latest", publish(registry, tmp_path, seed=2).version, reason="")
    assert run() == ("tuned@v1",)
    for folder in ("aliases", "moves"):
        shutil.rmtree(tmp_path / "storage" / "registry" / "models" / "tuned" / folder)
    assert run() == ("tuned@v2", "tuned@v3", "base@v1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"lora_alpha": None}, "lora_alpha is None, not a positive number"),
        ({"alpha_pattern": {"q_proj": 4}, "fan_in_fan_out": True}, "fan_in_fan_out is True; alpha_pattern"),
    ],
)
def test_what_cannot_be_served_is_not_published(
    changes: dict, words: str, registry: Registry, base: ModelVersion, tmp_path: Path
) -> None:
    with pytest.raises(RegistryError, match=words):
        publish(registry, tmp_path, **changes)
    assert registry.names() == ["base"]


def test_the_scale_follows_peft() -> None:
    assert parse_adapter_config(CONFIG, "here").scale(2) == 4
    assert parse_adapter_config(CONFIG | {"use_rslora": True}, "here").scale(4) == 4
    assert parse_adapter_config(CONFIG | {"use_dora": True}, "here").kind == "dora"


def test_base_and_adapter_must_belong_together(registry: Registry, base: ModelVersion, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="say of which version: adapter_of"):
        publish(registry, tmp_path, SPEC)
    with pytest.raises(RegistryError, match=r"no adapter_config\.json and no adapter_model\.safetensors"):
        registry.publish("tuned", tmp_path / "base", ADAPTER)
    with pytest.raises(RegistryError, match="base@v7 is not in"):
        publish(registry, tmp_path, ADAPTER.model_copy(update={"adapter_of": "base@v7"}))
    with pytest.raises(RegistryError, match="cannot adapt base@v1, which is a model for task generate"):
        publish(registry, tmp_path, ADAPTER.model_copy(update={"task": "embed"}))
    first = publish(registry, tmp_path)
    with pytest.raises(RegistryError, match="which is an adapter itself"):
        publish(registry, tmp_path, ADAPTER.model_copy(update={"adapter_of": first.reference}), seed=3)
    with pytest.raises(ValueError, match="must be model@vN"):
        VersionSpec(**dict(SPEC) | {"adapter_of": "base@latest"})
    assert json.loads(first.to_json())["adapter_of"] == "base@v1"
