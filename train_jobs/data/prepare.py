"""A preparation job enters, a committed directory of prepared data leaves: ``<storage>/data/<name>/<digest>/``.

    fetch -> digest -> there already? -> cut into chunks -> transform (executor) -> deduplicate, split, pack -> commit

The directory's name is the digest of all that decides its bytes, so the same job on the same inputs finds its data.
A killed job leaves nothing that counts.
"""

import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec

from cluster.errors import DataError
from cluster.registry.progress import Progress, no_progress
from cluster.registry.sources.lock import import_lock
from cluster.registry.store import Registry
from cluster.registry.tree import file_sha256, remove_folder
from cluster.runs.files import MANIFEST, data_directory, prepared_directory, storage_directory
from cluster.runs.prepared import (
    SPLITS,
    FileEntry,
    Manifest,
    SourceEntry,
    read_manifest,
    write_manifest,
)
from train_jobs.data.chunking import Chunk, cut
from train_jobs.data.executors import Executor
from train_jobs.data.fetching import Found, fetch
from train_jobs.data.gathering import Gathered, gather
from train_jobs.data.spec import PrepareSpec
from train_jobs.data.tokenizer import FoundTokenizer, check_chat_template, find_tokenizer
from train_jobs.data.transform import Transform

_RECIPE = 1
"""Grows when the same inputs and settings give other bytes than before."""


def prepare(spec: PrepareSpec, storage: str, executor: Executor, progress: Progress = no_progress) -> Manifest:
    """The manifest of the job's data, prepared unless it is there already.

    DataError says what of the inputs cannot be used, SourceError what cannot be fetched; nothing is left then.
    """
    place = storage_directory(storage)
    with import_lock(data_directory(place, spec.name).parent / ".work", spec.name, progress) as work:
        tokenizer, inputs = _bring(spec, storage, work, progress)
        digest = _digest(spec, tokenizer, inputs)
        directory = prepared_directory(place, spec.name, digest)
        manifest = _committed(directory, digest)
        if manifest is None:
            manifest = _build(spec, digest, tokenizer, inputs, executor, work / "ready", progress)
            remove_folder(directory)
            directory.parent.mkdir(parents=True, exist_ok=True)
            os.replace(work / "ready", directory)
    return manifest


def find_current(spec: PrepareSpec, storage: str, progress: Progress = no_progress) -> Manifest | None:
    """The manifest of the job's data where they are prepared already; None when that would have to be done.

    Sources are downloaded to know. DataError and SourceError are those of :func:`prepare`.
    """
    place = storage_directory(storage)
    with import_lock(data_directory(place, spec.name).parent / ".work", spec.name, progress) as work:
        digest = _digest(spec, *_bring(spec, storage, work, progress))
    return _committed(prepared_directory(place, spec.name, digest), digest)


def _bring(
    spec: PrepareSpec, storage: str, work: Path, progress: Progress
) -> tuple[FoundTokenizer, tuple[Found, ...]]:
    """The tokenizer and the inputs, on this machine."""
    registry = Registry(storage)
    tokenizer = find_tokenizer(spec.tokenizer, registry, progress)
    if spec.task in ("sft", "dpo"):
        check_chat_template(tokenizer)
    downloads = registry.cache / "downloads"
    found = (
        fetch(each, downloads=downloads, work=work / f"input-{number}", progress=progress)
        for number, each in enumerate(spec.inputs)
    )
    return tokenizer, tuple(found)


def _digest(spec: PrepareSpec, tokenizer: FoundTokenizer, inputs: Sequence[Found]) -> str:
    """Hex sha256 over what decides the bytes: not over names, places, pins and limits."""
    settings = {
        "recipe": _RECIPE,
        "task": spec.task,
        "sequence_tokens": spec.sequence_tokens,
        "clean": asdict(spec.clean),
        "split": asdict(spec.split),
        "labels": spec.labels,
        "tokenizer": tokenizer.entry.digest,
        "inputs": [
            {
                "files": found.digest,
                "format": each.format,
                "fields": asdict(each.fields),
                "encoding": each.encoding,
                "weight": each.weight,
            }
            for each, found in zip(spec.inputs, inputs, strict=True)
        ],
    }
    return hashlib.sha256(msgspec.json.encode(settings, order="deterministic")).hexdigest()


def _committed(directory: Path, digest: str) -> Manifest | None:
    if not (directory / MANIFEST).is_file():
        return None
    manifest = read_manifest(directory)
    whole = all(
        (directory / entry.path).is_file() and (directory / entry.path).stat().st_size == entry.size
        for entry in manifest.files
    )
    return manifest if whole and manifest.digest == digest else None


def _build(
    spec: PrepareSpec,
    digest: str,
    tokenizer: FoundTokenizer,
    inputs: Sequence[Found],
    executor: Executor,
    directory: Path,
    progress: Progress,
) -> Manifest:
    """Write everything into ``directory``, the manifest last."""
    transform = Transform(
        task=spec.task,
        clean=spec.clean,
        labels=None if spec.labels is None else frozenset(spec.labels),
        tokenizer=tokenizer.text,
        sequence_tokens=spec.sequence_tokens,
    )
    chunks: list[Chunk] = []
    for number, (each, found) in enumerate(zip(spec.inputs, inputs, strict=True)):
        chunks += cut(found, each, spec.task, source=number, first_number=len(chunks))
    directory.mkdir()
    try:
        batches = executor.run(transform, chunks)
        gathered = gather(spec, batches, directory, tokenizer.entry.pad_token_id, progress)
        manifest = _manifest(spec, digest, tokenizer, inputs, gathered, _copy_tokenizer(tokenizer, directory))
        write_manifest(directory, manifest)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(f"{directory}: the disk is full; make room, and run the job again") from error
    return manifest


def _copy_tokenizer(tokenizer: FoundTokenizer, directory: Path) -> list[FileEntry]:
    paths = tokenizer.copy_to(directory)
    return [
        FileEntry(path=path.relative_to(directory).as_posix(), size=path.stat().st_size, sha256=file_sha256(path))
        for path in paths
    ]


def _manifest(
    spec: PrepareSpec,
    digest: str,
    tokenizer: FoundTokenizer,
    inputs: Sequence[Found],
    gathered: Gathered,
    tokenizer_files: list[FileEntry],
) -> Manifest:
    notes = list(gathered.notes)
    context = tokenizer.entry.context_tokens
    if context is not None and spec.sequence_tokens > context:
        notes.append(
            f"sequence_tokens is {spec.sequence_tokens}, but the model that brought the tokenizer reads {context}: "
            "it cannot be trained on this data"
        )
    return Manifest(
        name=spec.name,
        task=spec.task,
        digest=digest,
        tokenizer=tokenizer.entry,
        sequence_tokens=spec.sequence_tokens,
        labels=gathered.labels,
        num_rows=gathered.num_rows,
        num_bad_rows=gathered.num_bad_rows,
        num_duplicates=gathered.num_duplicates,
        num_too_short=gathered.num_too_short,
        num_without_targets=gathered.num_without_targets,
        bad_rows_sample=gathered.bad_rows,
        notes=tuple(notes),
        splits={split: gathered.splits[split] for split in SPLITS},
        files=tuple(sorted([*gathered.files, *tokenizer_files], key=lambda entry: entry.path)),
        sources=tuple(
            SourceEntry(
                source=found.uri,
                digest=found.digest,
                format=each.format,
                weight=each.weight,
                num_files=len(found.names),
                num_bytes=found.num_bytes,
                num_rows=gathered.rows_of_source[number],
            )
            for number, (each, found) in enumerate(zip(spec.inputs, inputs, strict=True))
        ),
    )
