"""Publishing, finding and materializing versions: idempotent, numbered once, verified, crash-safe."""

import json
import multiprocessing
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.errors import RegistryError
from cluster.registry import materialize as materializing
from cluster.registry.manifest import Lineage, ModelVersion, VersionSpec, parse_manifest
from cluster.registry.materialize import materialize, verify
from cluster.registry.store import Registry, blob_path, manifest_path
from cluster.registry.tree import LocalTree, RemoteTree, open_tree
from tests.support.tiny_checkpoint import write_checkpoint

SPEC = VersionSpec(task="generate", dtype="float32", architecture="LlamaForCausalLM", model_type="llama")


@pytest.fixture(params=["local", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    if request.param == "local":
        return Registry(str(tmp_path / "storage"))
    return Registry(f"memory://{uuid.uuid4().hex}", cache=tmp_path / "cache")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


def test_published_version_is_found_listed_and_materialized(registry: Registry, checkpoint: Path) -> None:
    spec = SPEC.model_copy(update={"metrics": {"loss": 1.5}, "lineage": Lineage(parents=("a@v1",), job="train-1")})
    version = registry.publish("tiny", checkpoint, spec)
    assert (version.reference, version.number) == ("tiny@v1", 1)
    assert registry.names() == ["tiny"]
    assert registry.versions("tiny") == [version] == [registry.get("tiny", "v1")]
    assert version.lineage.parents == ("a@v1",)
    directory = materialize(registry, version)
    for entry in version.files:
        assert (directory / entry.path).read_bytes() == (checkpoint / entry.path).read_bytes()
    assert registry.read_file(version, "config.json") == (checkpoint / "config.json").read_bytes()


def test_same_content_is_the_same_version(registry: Registry, checkpoint: Path, tmp_path: Path) -> None:
    first = registry.publish("tiny", checkpoint, SPEC)
    assert registry.publish("tiny", checkpoint, SPEC) == first
    other_task = registry.publish("tiny", checkpoint, SPEC.model_copy(update={"task": "embed"}))
    other_bytes = registry.publish("tiny", write_checkpoint(tmp_path / "other", seed=1), SPEC)
    assert [other_task.version, other_bytes.version] == ["v2", "v3"]


def test_same_bytes_are_stored_once(registry: Registry, checkpoint: Path) -> None:
    registry.publish("one", checkpoint, SPEC)
    registry.publish("two", checkpoint, SPEC)
    folders = registry.tree.names("blobs/sha256")
    blobs = [blob for folder in folders for blob in registry.tree.names(f"blobs/sha256/{folder}")]
    assert len(blobs) == len(list(checkpoint.iterdir()))


def test_concurrent_publishers_get_different_numbers(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "storage"))
    directories = [write_checkpoint(tmp_path / f"c{seed}", seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda directory: registry.publish("tiny", directory, SPEC), directories))
    assert sorted(version.number for version in versions) == list(range(1, 9))
    assert len(registry.versions("tiny")) == 8


def test_concurrent_publishers_of_one_content_share_a_version(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "storage"))
    directory = write_checkpoint(tmp_path / "c")
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda _: registry.publish("tiny", directory, SPEC), range(8)))
    assert {version.version for version in versions} == {"v1"}


def _publish_in_process(storage: str, directory: str) -> str:
    return Registry(storage).publish("tiny", Path(directory), SPEC).version


def test_publishers_in_different_processes(tmp_path: Path) -> None:
    directories = [str(write_checkpoint(tmp_path / f"c{seed}", seed=seed)) for seed in range(4)]
    storage = str(tmp_path / "storage")
    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        versions = pool.starmap(_publish_in_process, [(storage, directory) for directory in directories])
    assert sorted(versions) == ["v1", "v2", "v3", "v4"]


def test_unknown_versions_and_aliases_name_what_exists(registry: Registry, checkpoint: Path) -> None:
    registry.publish("tiny", checkpoint, SPEC)
    with pytest.raises(RegistryError, match=r"tiny@v9 .* versions of tiny: v1"):
        registry.get("tiny", "v9")
    with pytest.raises(RegistryError, match="no such alias"):
        registry.resolve("tiny@champion")
    with pytest.raises(RegistryError, match="models there: tiny"):
        registry.resolve("absent@v1")


@pytest.mark.parametrize("name", ["", "../up", "a/b", "A", "-a", "a" * 41, "a\n", "ä", "."])
def test_odd_model_names_are_refused(registry: Registry, checkpoint: Path, name: str) -> None:
    with pytest.raises(RegistryError, match="model name"):
        registry.publish(name, checkpoint, SPEC)
    with pytest.raises(RegistryError, match="model name"):
        registry.versions(name)


@pytest.mark.parametrize("version", ["v0", "1", "v-1", "../v1", "v1/..", "latest", "v1 "])
def test_odd_version_names_are_refused(registry: Registry, version: str) -> None:
    with pytest.raises(RegistryError, match="allowed are v1, v2"):
        registry.get("tiny", version)


def _manifest(registry: Registry, checkpoint: Path) -> dict[str, Any]:
    version = registry.publish("tiny", checkpoint, SPEC)
    return json.loads(version.to_json())


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a//b", "", "a\\b", "./a", "a/"])
def test_manifest_paths_cannot_leave_the_directory(registry: Registry, checkpoint: Path, path: str) -> None:
    content = _manifest(registry, checkpoint)
    content["files"][0]["path"] = path
    with pytest.raises(RegistryError, match="must be relative"):
        parse_manifest(json.dumps(content).encode(), "here")


def test_manifest_of_a_newer_program_is_refused_by_field(registry: Registry, checkpoint: Path) -> None:
    content = _manifest(registry, checkpoint)
    with pytest.raises(RegistryError, match=r"here .*unknown shiny .*newer Manta.*update"):
        parse_manifest(json.dumps(content | {"shiny": 1}).encode(), "here")
    with pytest.raises(RegistryError, match=r"manifest_format .*newer Manta"):
        parse_manifest(json.dumps(content | {"manifest_format": 3}).encode(), "here")
    with pytest.raises(RegistryError, match="not a manifest"):
        parse_manifest(b'{"name": ', "here")


def test_moved_manifest_is_refused(registry: Registry, checkpoint: Path) -> None:
    version = registry.publish("tiny", checkpoint, SPEC)
    registry.tree.create(manifest_path("other", "v1"), version.to_json())
    with pytest.raises(RegistryError, match="says it is tiny@v1"):
        registry.get("other", "v1")


def _damage(registry: Registry, version: ModelVersion, path: str) -> None:
    blob = blob_path(version.file(path).sha256)
    if isinstance(registry.tree, LocalTree):
        registry.tree.local_path(blob).chmod(0o644)
        data = registry.tree.read(blob)
        registry.tree.local_path(blob).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    else:
        data = registry.tree.read(blob)
        registry.tree.replace(blob, bytes([data[0] ^ 1]) + data[1:])


def test_damaged_blob_is_refused_and_can_be_replaced(registry: Registry, checkpoint: Path) -> None:
    version = registry.publish("tiny", checkpoint, SPEC)
    assert verify(registry, version) == []
    _damage(registry, version, "model.safetensors")
    with pytest.raises(RegistryError, match=r"tiny@v1: model.safetensors is damaged: sha256 .* published as"):
        materialize(registry, version)
    assert [problem.split(":")[1] for problem in verify(registry, version, remove_damaged=True)] == [
        " model.safetensors is damaged"
    ]
    assert not registry.complete(version)
    assert registry.publish("tiny", checkpoint, SPEC) == version
    assert verify(registry, version) == []
    assert (materialize(registry, version) / "model.safetensors").is_file()


def test_damaged_small_file_is_refused_when_read(registry: Registry, checkpoint: Path) -> None:
    version = registry.publish("tiny", checkpoint, SPEC)
    _damage(registry, version, "config.json")
    with pytest.raises(RegistryError, match=r"config.json is damaged"):
        registry.read_file(version, "config.json")


def test_missing_blob_is_named(registry: Registry, checkpoint: Path) -> None:
    version = registry.publish("tiny", checkpoint, SPEC)
    registry.tree.remove(blob_path(version.file("model.safetensors").sha256))
    with pytest.raises(RegistryError, match=r"the blob of model.safetensors is missing"):
        materialize(registry, version)
    assert "is missing" in verify(registry, version)[0]


def test_damaged_download_is_fetched_again(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(f"memory://{uuid.uuid4().hex}", cache=tmp_path / "cache")
    version = registry.publish("tiny", checkpoint, SPEC)
    directory = materialize(registry, version)
    (directory / "config.json").write_text("{}")
    monkeypatch.setattr(materializing, "_verified", set())  # as a new process starts
    assert (materialize(registry, version) / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()


def test_many_readers_at_once(tmp_path: Path, checkpoint: Path) -> None:
    registry = Registry(str(tmp_path / "storage"))  # readers of memory:// would share one file position
    version = registry.publish("tiny", checkpoint, SPEC)
    with ThreadPoolExecutor(8) as pool:
        directories = set(pool.map(lambda _: materialize(registry, version), range(16)))
    (directory,) = directories
    assert sorted(path.name for path in directory.iterdir()) == sorted(entry.path for entry in version.files)
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_local_materialization_costs_no_second_copy(tmp_path: Path, checkpoint: Path) -> None:
    registry = Registry(str(tmp_path / "storage"))
    version = registry.publish("tiny", checkpoint, SPEC)
    blob = tmp_path / "storage" / "registry" / blob_path(version.file("model.safetensors").sha256)
    assert (materialize(registry, version) / "model.safetensors").samefile(blob)


def test_progress_counts_up_to_the_total(registry: Registry, checkpoint: Path) -> None:
    seen: dict[str, list[tuple[int, int | None]]] = {}

    def progress(label: str, done: int, total: int | None, unit: str) -> None:
        assert unit == "B"
        seen.setdefault(label, []).append((done, total))

    version = registry.publish("tiny", checkpoint, SPEC, progress=progress)
    materialize(registry, version, progress=progress)
    assert set(seen) == {"hashing", "storing", "fetching tiny@v1", "verifying tiny@v1"}
    for counts in seen.values():
        assert counts == sorted(counts)
        assert counts[-1] == (version.total_bytes, version.total_bytes)


class FailingMemory(MemoryFileSystem):
    """A memory file system whose writing calls fail, all of them, after ``allowed`` have succeeded."""

    protocol = "failing"
    cachable = False
    allowed = 10**9

    def _spend(self) -> None:
        if self.allowed == 0:
            raise OSError("the machine went away")
        self.allowed -= 1

    def pipe_file(self, *arguments: Any, **options: Any) -> Any:
        self._spend()
        return super().pipe_file(*arguments, **options)

    def put_file(self, *arguments: Any, **options: Any) -> Any:
        self._spend()
        return super().put_file(*arguments, **options)

    def rm_file(self, *arguments: Any, **options: Any) -> Any:
        self._spend()
        return super().rm_file(*arguments, **options)


class FailingLocal(LocalTree):
    """A local tree whose writing calls fail, all of them, after ``allowed`` have succeeded."""

    allowed = 10**9

    def _spend(self) -> None:
        if self.allowed == 0:
            raise OSError("the machine went away")
        self.allowed -= 1

    def create(self, path: str, data: bytes) -> bool:
        self._spend()
        return super().create(path, data)

    def replace(self, path: str, data: bytes) -> None:
        self._spend()
        super().replace(path, data)

    def append(self, path: str, data: bytes) -> None:
        self._spend()
        super().append(path, data)

    def put(self, source: Path, path: str, done: Any) -> None:
        self._spend()
        super().put(source, path, done)

    def remove(self, path: str) -> None:
        self._spend()
        super().remove(path)


def failing_registry(kind: str, tmp_path: Path) -> tuple[Registry, Any]:
    """A registry, and the object whose ``allowed`` says how many writes still succeed."""
    if kind == "local":
        tree = FailingLocal(tmp_path / "registry")
        return Registry(str(tmp_path), tree=tree), tree
    filesystem = FailingMemory()
    root = f"/{uuid.uuid4().hex}"
    remote = RemoteTree(filesystem, root, f"failing:/{root}")
    return Registry(remote.uri, tree=remote, cache=tmp_path / "cache"), filesystem


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_interrupted_publish_leaves_nothing_half(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    interrupted = 0
    for allowed in range(100):
        registry, breaker = failing_registry(kind, tmp_path / str(allowed))
        breaker.allowed = allowed
        try:
            version = registry.publish("tiny", checkpoint, SPEC)
            registry.set_alias("tiny", "latest", version.version, reason="test")
        except OSError:
            interrupted += 1
            finished = False
        else:
            finished = True
        breaker.allowed = 10**9
        for seen in registry.versions("tiny"):
            assert verify(registry, seen) == []
        for alias in registry.aliases.names("tiny"):
            assert verify(registry, registry.resolve(f"tiny@{alias}")) == []
        again = registry.publish("tiny", checkpoint, SPEC)
        registry.set_alias("tiny", "latest", again.version, reason="test")
        assert again.version == "v1"
        assert registry.resolve("tiny") == again
        if finished:
            break
    assert interrupted >= 5


def test_storage_must_be_absolute() -> None:
    with pytest.raises(RegistryError, match="relative"):
        open_tree("models/here")
    with pytest.raises(RegistryError, match="cannot be opened"):
        open_tree("nosuchscheme://bucket/registry")


def test_file_uri_is_the_local_folder(tmp_path: Path) -> None:
    tree = open_tree(f"file://{tmp_path}/registry")
    assert isinstance(tree, LocalTree)
    assert tree.root == tmp_path / "registry"
    assert fsspec.available_protocols()
