"""What of a config's models is in the registry, and what an interrupted import left to do."""

import pytest

from cluster.config.schema import ClusterConfig
from cluster.control.versions import finish_imports, known_versions
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
