"""What of a config's models is in the registry, and what an interrupted import left to do."""

import pytest

from cluster.config.load import load_text
from cluster.config.schema import ClusterConfig
from cluster.control.versions import finish_imports, known_versions, without_awaited
from cluster.registry.manifest import VersionSpec
from cluster.registry.store import Registry
from tests.support.tiny_checkpoint import write_checkpoint
from tests.unit.cluster.plan_examples import config


@pytest.fixture
def imported(tmp_path) -> tuple[ClusterConfig, Registry]:
    """A registry that holds the config's model as an import leaves it that ended before its last step."""
    wanted = config()
    registry = Registry(str(tmp_path / "storage"))
    spec = VersionSpec(
        task="generate",
        dtype="bfloat16",
        architecture="LlamaForCausalLM",
        model_type="llama",
        source=str(wanted.models[0].source),
    )
    registry.publish("smollm2", write_checkpoint(tmp_path / "checkpoint"), spec)
    return wanted, registry


def test_an_import_that_ended_before_its_alias_is_finished(imported):
    wanted, registry = imported
    known = known_versions(wanted, registry)
    assert registry.aliases.read("smollm2", "latest") is None
    finish_imports(wanted, registry, known)
    assert registry.resolve("smollm2").version == "v1"


def test_an_alias_that_a_person_moved_away_stays(imported, tmp_path):
    wanted, registry = imported
    known = known_versions(wanted, registry)
    finish_imports(wanted, registry, known)
    spec = VersionSpec(task="generate", dtype="bfloat16", architecture="LlamaForCausalLM", model_type="llama")
    other = registry.publish("smollm2", write_checkpoint(tmp_path / "other", seed=1), spec)
    registry.set_alias("smollm2", "latest", other.version, reason="better")
    finish_imports(wanted, registry, known)
    assert registry.resolve("smollm2") == other


AWAITING = """\
name: awaiting
cluster: {nodes: [{name: box, resources: {CPU: 2}}]}
models:
  - {name: smollm2, source: "hf://org/repo"}
  - {name: orator, source: "registry://orator@latest"}
  - {name: mistaken, source: "registry://oratr@latest"}
jobs:
  - {name: text, kind: prepare, task: lm, inputs: [{source: "path:///t", format: text}], tokenizer: "hf://o/r",
     sequence_tokens: 64}
  - name: speeches
    kind: train
    task: lm
    base: {source: "hf://org/repo"}
    data: text
    batch: {sequences: 8, micro_sequences: 4}
    duration: {epochs: 1}
    optimizer: {kind: sgd, lr: 1}
    publish: {model: orator}
"""


def test_what_a_job_has_still_to_make_is_left_out_until_it_is_there(imported, tmp_path):
    _, registry = imported
    config = load_text(AWAITING, "f")
    served, notes = without_awaited(config, registry)
    assert [model.name for model in served.models] == ["smollm2", "mistaken"]
    [note] = notes
    assert (
        note == "orator is left out: registry://orator@latest is not there yet; job speeches makes it (`manta train`)"
    )
    spec = VersionSpec(task="generate", dtype="bfloat16", architecture="LlamaForCausalLM", model_type="llama")
    version = registry.publish("orator", write_checkpoint(tmp_path / "orator"), spec)
    registry.set_alias("orator", "latest", version.version, reason="job speeches")
    assert without_awaited(config, registry) == (config, ())
