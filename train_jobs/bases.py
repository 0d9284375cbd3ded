"""What training starts from: the ``base:`` of a job in, its directory on this machine and what identifies it out."""

import hashlib
from dataclasses import dataclass

import msgspec

from cluster.config.models import ModelConfig
from cluster.config.sources import RegistrySource, parse_source
from cluster.control.code import code_digest
from cluster.plan.types import Task as ServedTask
from cluster.registry.manifest import ModelVersion
from cluster.registry.materialize import materialize
from cluster.registry.progress import Progress
from cluster.registry.sources.importer import import_source
from cluster.registry.store import Registry
from train_jobs.job import JobSpec
from train_jobs.tasks.spec import Architecture, BaseSpec, Checkpoint

_SERVED_AS: dict[str, ServedTask] = {"lm": "generate", "sft": "generate", "dpo": "generate", "classify": "embed"}
"""As what a base from outside the registry is imported, where no model of the config says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundBase:
    """A base on this machine."""

    spec: BaseSpec
    version: str
    """Identifies its bytes: ``name@v3`` of the registry, or the digest of an architecture."""
    registered: ModelVersion | None
    """None for an architecture."""


def find_base(job: JobSpec, models: tuple[ModelConfig, ...], registry: Registry, progress: Progress) -> FoundBase:
    """The base of a job; a source from outside the registry is imported into it first.

    RegistryError when a version does not exist, SourceError when a source cannot be fetched.
    """
    if job.base.source is None:
        assert job.base.architecture is not None, "the config has one of the two"
        content = msgspec.json.encode(job.base.architecture, order="deterministic")
        digest = hashlib.sha256(content).hexdigest()
        return FoundBase(
            spec=Architecture(settings=job.base.architecture), version=f"architecture:{digest}", registered=None
        )
    version = find_version(job.base.source, job.name, _SERVED_AS[job.task], models, registry, progress)
    directory = materialize(registry, version, progress=progress)
    checkpoint = Checkpoint(directory=directory, name=f"registry://{version.reference}")
    return FoundBase(spec=checkpoint, version=version.reference, registered=version)


def find_version(
    source: str,
    job: str,
    task: ServedTask,
    models: tuple[ModelConfig, ...],
    registry: Registry,
    progress: Progress,
) -> ModelVersion:
    """The registry's version of a model; one from outside is imported, as the config's model of that source is.

    Where the config serves no such model, it is imported as ``<job>-base`` for ``task``, in float32.
    """
    parsed = parse_source(source)
    if isinstance(parsed, RegistrySource):
        return registry.resolve(f"{parsed.model}@{parsed.reference}")
    for model in models:
        if model.source == parsed:
            return import_source(
                registry,
                model.name,
                parsed,
                sha256=model.sha256,
                task=model.task,
                dtype=model.dtype,
                progress=progress,
                code_digest=code_digest(),
            )
    return import_source(
        registry, f"{job}-base"[:40], parsed, task=task, dtype="float32", progress=progress, code_digest=code_digest()
    )
