"""Models of the config in the registry: what is there already, and bringing in what is not."""

from collections.abc import Mapping
from pathlib import Path

from cluster.config.jobs_train import TrainJob
from cluster.config.models import ModelConfig
from cluster.config.schema import ClusterConfig
from cluster.config.sources import AnySource, PathSource, RegistrySource
from cluster.errors import RegistryError
from cluster.plan.types import KnownVersion
from cluster.registry.facts import read_adapter_facts, read_facts
from cluster.registry.manifest import ModelVersion
from cluster.registry.progress import Progress
from cluster.registry.sources.importer import LATEST, find_imported, import_source, path_sha256
from cluster.registry.store import Registry


def without_awaited(config: ClusterConfig, registry: Registry) -> tuple[ClusterConfig, tuple[str, ...]]:
    """The config without the models and adapters that a job of it has still to make, and a sentence for each."""
    makers = {job.publish.model: job.name for job in config.jobs if isinstance(job, TrainJob) and job.publish}
    notes: list[str] = []

    def is_there(name: str, source: object) -> bool:
        if not isinstance(source, RegistrySource) or source.model not in makers:
            return True
        try:
            registry.resolve(f"{source.model}@{source.reference}")
        except RegistryError:
            job = makers[source.model]
            notes.append(f"{name} is left out: {source} is not there yet; job {job} makes it (`manta train`)")
            return False
        return True

    models = []
    for model in config.models:
        if is_there(model.name, model.source):
            kept = tuple(each for each in model.adapters if is_there(each.name, each.source))
            models.append(model.model_copy(update={"adapters": kept}))
    return config.model_copy(update={"models": tuple(models)}), tuple(notes)


def known_versions(config: ClusterConfig, registry: Registry) -> dict[str, KnownVersion]:
    """The versions that need no import, also those of adapters, by name.

    RegistryError when a ``registry://`` source names none that exists.
    """
    found = {model.name: _find(model, registry) for model in config.models}
    for model in config.models:
        found |= {adapter.name: _resolve(adapter.source, registry) for adapter in model.adapters}
    return {name: _known(registry, version) for name, version in found.items() if version is not None}


def finish_imports(config: ClusterConfig, registry: Registry, known: Mapping[str, KnownVersion]) -> None:
    """Point alias ``latest`` at every known version that it never pointed at: its import ended before that."""
    for model in config.models:
        if model.name in known and not isinstance(model.source, RegistrySource):
            version = known[model.name].version
            if all(move.version != version for move in registry.aliases.history(model.name, LATEST)):
                registry.set_alias(model.name, LATEST, version, reason=f"import of {model.source}")


def import_missing(
    config: ClusterConfig, registry: Registry, known: Mapping[str, KnownVersion], progress: Progress, code_digest: str
) -> dict[str, KnownVersion]:
    """``known`` and every other model of ``config``, imported now; SourceError says what is wrong with a source."""
    versions = dict(known)
    for model in config.models:
        if model.name not in versions:
            version = import_source(
                registry,
                model.name,
                str(model.source),
                sha256=model.sha256,
                task=model.task,
                dtype=model.dtype,
                progress=progress,
                code_digest=code_digest,
            )
            versions[model.name] = _known(registry, version)
    return versions


def _resolve(source: AnySource, registry: Registry) -> ModelVersion:
    assert isinstance(source, RegistrySource), "only the registry has adapters; this is a bug"
    return registry.resolve(f"{source.model}@{source.reference}")


def _find(model: ModelConfig, registry: Registry) -> ModelVersion | None:
    if isinstance(model.source, RegistrySource):
        return _resolve(model.source, registry)
    sha256 = model.sha256
    if isinstance(model.source, PathSource) and Path(model.source.path).exists():
        sha256 = path_sha256(Path(model.source.path))  # the same path may hold other bytes by now
    return find_imported(registry, model.name, str(model.source), sha256=sha256, task=model.task, dtype=model.dtype)


def _known(registry: Registry, version: ModelVersion) -> KnownVersion:
    base = version if version.adapter_of is None else registry.resolve(version.adapter_of)
    return KnownVersion(
        name=version.name,
        version=version.version,
        created=int(version.created),
        facts=read_facts(registry, version),
        quantization=base.quantization,
        adapter=read_adapter_facts(registry, version),
        chat_template=version.chat_template or base.chat_template,
    )
