"""The root of the config, ``ClusterConfig``, and its JSON schema for editors."""

import os
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from cluster.config.base import Name, StrictModel, refuse
from cluster.config.gateway import GatewaySection
from cluster.config.jobs import JobConfig
from cluster.config.models import ModelConfig
from cluster.config.nodes import ClusterSection

_STORAGE_REMEDY = "write /absolute/path, ~/path or s3://bucket/prefix"


def _check_storage(value: object) -> object:
    if not isinstance(value, str) or not value.strip():
        refuse("is not a place for files", limit="an absolute path or a URI", remedy=_STORAGE_REMEDY)
    if any(not character.isprintable() for character in value):
        refuse("contains an unprintable character", limit="an absolute path or a URI", remedy=_STORAGE_REMEDY)
    if "://" in value:
        if value.startswith("memory://"):
            refuse(
                "is private to one process, so nobody else would see the files",
                limit="a shared place",
                remedy=_STORAGE_REMEDY,
            )
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/]\S*|file:///\S+", value):
            refuse("is not a complete URI", limit="SCHEME://BUCKET/PREFIX", remedy=_STORAGE_REMEDY)
        return value
    if not os.path.isabs(os.path.expanduser(value)):
        refuse(
            "is a relative path, which each process would read differently",
            limit="an absolute path or a URI",
            remedy=_STORAGE_REMEDY,
        )
    return value


class ClusterConfig(StrictModel):
    """Everything one ``manta`` cluster is: its machines, its gateway, its models and its jobs."""

    name: Name
    """Name of this cluster, for its state, logs and temporary files."""
    storage: Annotated[str, BeforeValidator(_check_storage, json_schema_input_type=str)] = "~/.manta"
    """Where the registry, caches and state live: a path that is absolute after ``~``, or a URI."""
    cluster: ClusterSection
    """The Ray cluster everything runs on."""
    gateway: GatewaySection = GatewaySection()
    """The HTTP front."""
    models: Annotated[tuple[ModelConfig, ...], Field(strict=False)] = ()
    """The served models."""
    jobs: Annotated[tuple[Annotated[JobConfig, Field(discriminator="kind")], ...], Field(strict=False)] = ()
    """What makes models: data to prepare, models to train, to tune and to evaluate."""

    @property
    def storage_root(self) -> str:
        """``storage`` with ``~`` expanded and no slash at the end: an absolute path or a URI."""
        if "://" in self.storage:
            return self.storage.rstrip("/")
        return os.path.normpath(os.path.expanduser(self.storage))


def json_schema() -> dict[str, Any]:
    """JSON schema of the whole YAML, for editors and ``manta config schema``; defaults as people write them."""
    schema = ClusterConfig.model_json_schema()
    sections = {section.__name__: section for section in StrictModel.__subclasses__()}
    for name, described in [("ClusterConfig", schema), *schema["$defs"].items()]:
        written = sections[name].model_construct().model_dump(mode="json")
        for key, described_key in described["properties"].items():
            described_key.pop("title", None)
            if "default" in described_key:
                described_key["default"] = written[key]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
