"""Garbage collection: removes what nothing needs, keeps what anything may need, and survives a crash anywhere."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import RegistryError
from cluster.registry.gc import Collected, collect, pin, pins, unpin
from cluster.registry.manifest import ModelVersion, VersionSpec
from cluster.registry.materialize import materialize, verify
from cluster.registry.store import Registry, blob_path, tombstone_path
from tests.support.tiny_checkpoint import write_checkpoint
from tests.unit.cluster.test_registry_store import failing_registry

SPEC = VersionSpec(task="generate", dtype="float32", architecture="LlamaForCausalLM", model_type="llama")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "storage"))


def _publish(registry: Registry, folder: Path, num_versions: int) -> list[ModelVersion]:
    directories = [write_checkpoint(folder / f"c{seed}", seed=seed) for seed in range(num_versions)]
    return [registry.publish("tiny", directory, SPEC) for directory in directories]


def _tomorrow() -> float:
    return time.time() + 86400


def _collect(
    registry: Registry, *, keep_last: int = 0, now: Callable[[], float] = _tomorrow, **options: object
) -> Collected:
    return collect(registry, keep_last=keep_last, now=now, **options)  # type: ignore[arg-type]


def _numbers(registry: Registry) -> list[int]:
    return [version.number for version in registry.versions("tiny")]


def test_young_versions_and_blobs_stay(registry: Registry, tmp_path: Path) -> None:
    _publish(registry, tmp_path, 2)
    collected = _collect(registry, now=time.time)
    assert (collected.versions, collected.blobs) == ((), ())
    assert _numbers(registry) == [1, 2]


def test_old_unreferenced_versions_go_with_their_blobs(registry: Registry, tmp_path: Path) -> None:
    first, second = _publish(registry, tmp_path, 2)
    collected = _collect(registry, keep_last=1)
    own_blob = first.file("model.safetensors").sha256
    assert collected.versions == ("tiny@v1",)
    assert collected.blobs == (own_blob,)
    assert collected.freed_bytes == first.file("model.safetensors").size
    assert registry.versions("tiny") == [second]
    assert verify(registry, second) == []
    with pytest.raises(RegistryError, match="tiny@v1 is not in"):
        registry.get("tiny", "v1")


def test_dry_run_only_says_it(registry: Registry, tmp_path: Path) -> None:
    _publish(registry, tmp_path, 3)
    said = _collect(registry, keep_last=1, dry_run=True)
    assert _numbers(registry) == [1, 2, 3]
    assert _collect(registry, keep_last=1) == said
    assert _numbers(registry) == [3]


def test_aliases_their_previous_pins_and_running_versions_stay(registry: Registry, tmp_path: Path) -> None:
    versions = _publish(registry, tmp_path, 6)
    registry.set_alias("tiny", "latest", "v1", reason="")
    registry.set_alias("tiny", "latest", "v2", reason="")
    pin(registry, versions[2], reason="a paper cites it")
    assert pins(registry, "tiny") == ["v3"]
    collected = _collect(registry, running=["tiny@v4"])
    assert collected.versions == ("tiny@v5", "tiny@v6")
    assert _numbers(registry) == [1, 2, 3, 4]
    assert unpin(registry, versions[2])
    assert not unpin(registry, versions[2])
    assert _collect(registry).versions == ("tiny@v3", "tiny@v4")


def test_numbers_are_not_given_twice(registry: Registry, tmp_path: Path) -> None:
    _publish(registry, tmp_path, 2)
    _collect(registry)
    assert _numbers(registry) == []
    assert registry.publish("tiny", tmp_path / "c0", SPEC).version == "v3"


def test_reused_version_is_young_again(registry: Registry, tmp_path: Path) -> None:
    _publish(registry, tmp_path, 1)
    nearly_two_hours = time.time() + 7000
    assert _collect(registry, now=lambda: nearly_two_hours, dry_run=True).versions == ("tiny@v1",)
    registry.tree.replace("models/tiny/versions/v1/reused-at", str(int(nearly_two_hours)).encode())
    assert _collect(registry, now=lambda: nearly_two_hours).versions == ()


def test_alias_that_comes_during_the_collection_saves_its_version(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(registry, tmp_path, 2)
    replace = registry.tree.replace

    def replace_then_alias(path: str, data: bytes) -> None:
        monkeypatch.setattr(registry.tree, "replace", replace)
        registry.aliases.set("tiny", "latest", "v1", reason="just in time")
        replace(path, data)

    monkeypatch.setattr(registry.tree, "replace", replace_then_alias)
    assert _collect(registry).versions == ("tiny@v2",)
    assert verify(registry, registry.resolve("tiny")) == []


def test_publisher_that_meets_a_collection_keeps_its_blobs(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (version,) = _publish(registry, tmp_path, 1)
    create = registry.tree.create

    def create_after_the_collection(path: str, data: bytes) -> bool:
        monkeypatch.setattr(registry.tree, "create", create)
        _collect(registry)
        assert registry.tree.size(blob_path(version.file("model.safetensors").sha256)) is None
        return create(path, data)

    monkeypatch.setattr(registry.tree, "create", create_after_the_collection)
    published = registry.publish("other", tmp_path / "c0", SPEC)
    assert verify(registry, published) == []


def test_cached_copies_of_removed_versions_go_and_open_files_stay_readable(
    registry: Registry, tmp_path: Path
) -> None:
    first, second = (materialize(registry, version) for version in _publish(registry, tmp_path, 2))
    half_made = first.parent / ".tmp-1-x"
    half_made.mkdir()
    with (first / "model.safetensors").open("rb") as file:
        _collect(registry, keep_last=1, grace_s=0)
        assert file.read() == (tmp_path / "c0" / "model.safetensors").read_bytes()
    assert [path.name for path in first.parent.iterdir()] == [second.name]


def test_leftovers_of_interrupted_writes_go(registry: Registry, tmp_path: Path) -> None:
    (version,) = _publish(registry, tmp_path, 1)
    leftover = tmp_path / "storage" / "registry" / "blobs" / "sha256" / "aa" / ".tmp-1-x"
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half")
    assert collect(registry, grace_s=3600).temporaries == ()
    assert collect(registry, grace_s=0, keep_last=1).temporaries == ("blobs/sha256/aa/.tmp-1-x",)
    assert not leftover.exists()
    assert verify(registry, version) == []


def test_version_that_an_interrupted_collection_hid_comes_back_when_it_is_wanted(
    registry: Registry, tmp_path: Path
) -> None:
    first, second = _publish(registry, tmp_path, 2)
    registry.set_alias("tiny", "latest", "v1", reason="")
    for version in (first, second):
        registry.tree.replace(tombstone_path("tiny", version.version), version.to_json())
    assert registry.versions("tiny") == []
    _collect(registry)
    assert registry.versions("tiny") == [first]
    assert registry.half_deleted() == []


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_interrupted_collection_leaves_nothing_half(kind: str, tmp_path: Path) -> None:
    for allowed in range(100):
        registry, breaker = failing_registry(kind, tmp_path / str(allowed))
        _publish(registry, tmp_path, 3)
        registry.set_alias("tiny", "latest", "v2", reason="")
        breaker.allowed = allowed
        try:
            _collect(registry)
        except OSError:
            finished = False
        else:
            finished = True
        breaker.allowed = 10**9
        for seen in registry.versions("tiny"):
            assert verify(registry, seen) == []
        assert registry.resolve("tiny").version == "v2"
        _collect(registry)
        assert _numbers(registry) == [2]
        folders = registry.tree.names("blobs/sha256")
        blobs = {blob for folder in folders for blob in registry.tree.names(f"blobs/sha256/{folder}")}
        assert blobs == {entry.sha256 for entry in registry.get("tiny", "v2").files}
        if finished:
            return
    pytest.fail("the collection never finished")
