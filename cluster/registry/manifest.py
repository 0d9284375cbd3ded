"""The manifest of a model version: what a published version is, and how its JSON is read and written.

Also the names: a model, a version, an alias and a file path each have one grammar, checked here, so that no name can
leave the registry's folder.
"""

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cluster.config.models import Dtype, Task
from cluster.errors import RegistryError

_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
_VERSION_NAME = re.compile(r"v[1-9][0-9]{0,8}")
_ALIAS_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_model_name(name: str) -> str:
    """``name`` if it is a model name; RegistryError with the grammar otherwise."""
    if _MODEL_NAME.fullmatch(name) is None:
        raise RegistryError(f"model name {name!r}: allowed are 1 to 40 of a-z, 0-9 and '-', not '-' first")
    return name


def check_version_name(version: str) -> str:
    """``version`` if it is ``v1``, ``v2``, ...; RegistryError otherwise."""
    if _VERSION_NAME.fullmatch(version) is None:
        raise RegistryError(f"version {version!r}: allowed are v1, v2, ...; list them with `manta models list`")
    return version


def check_alias_name(alias: str) -> str:
    """``alias`` if it is an alias name and cannot be taken for a version; RegistryError otherwise."""
    if _ALIAS_NAME.fullmatch(alias) is None or is_version_name(alias):
        raise RegistryError(
            f"alias {alias!r}: allowed are 1 to 40 of a-z, 0-9, '_' and '-', a letter first, "
            "and not the form of a version"
        )
    return alias


def is_version_name(text: str) -> bool:
    """Whether ``text`` has the form of a version (``v7``) rather than of an alias."""
    return _VERSION_NAME.fullmatch(text) is not None


def _check_file_path(path: str) -> str:
    parts = path.split("/")
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"file path {path!r} must be relative, with '/' between names, and without '.' or '..'")
    return path


def _check_base(reference: str | None) -> str | None:
    name, _, version = (reference or "x@v1").partition("@")
    if _MODEL_NAME.fullmatch(name) is None or not is_version_name(version):
        raise ValueError(f"adapter_of {reference!r} must be model@vN: an alias could come to mean another base")
    return reference


def _check_sha256(digest: str) -> str:
    if _SHA256.fullmatch(digest) is None:
        raise ValueError(f"sha256 {digest!r} must be 64 lower-case hexadecimal digits")
    return digest


FilePath = Annotated[str, AfterValidator(_check_file_path)]
Sha256 = Annotated[str, AfterValidator(_check_sha256)]


class ManifestModel(BaseModel):
    """Base of the manifest types: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileEntry(ManifestModel):
    """One file of a version."""

    path: FilePath
    """Relative to the version's directory, '/' between names."""
    size: int = Field(ge=0)
    """Bytes."""
    sha256: Sha256


class Lineage(ManifestModel):
    """Where a version comes from; None means not made by a job."""

    parents: tuple[str, ...] = ()
    """Versions it was made from, as ``model@version``."""
    job: str | None = None
    config_digest: str | None = None
    data_digest: str | None = None
    code_digest: str | None = None
    commit: str | None = None
    """Git commit of the code, where it ran from a repository."""


class VersionSpec(ManifestModel):
    """What the publisher says about a directory; with name, number and files it becomes a ModelVersion."""

    task: Task
    dtype: Dtype
    """Type of the floating-point weights."""
    architecture: str
    """transformers class name, e.g. ``LlamaForCausalLM``."""
    model_type: str
    """transformers model type, e.g. ``llama``."""
    quantization: str | None = None
    """Method named in ``config.json``'s ``quantization_config``; None for plain weights."""
    chat_template: bool = False
    """Whether the tokenizer carries a chat template."""
    source: str | None = None
    """URI it was imported from; None for a version that a job made."""
    source_sha256: Sha256 | None = None
    """Digest of the downloaded wheel or single file; of the list of file digests for a directory."""
    left_out: tuple[str, ...] = ()
    """Files of the source that were not taken (pickles, Python code, other formats)."""
    license: str | None = None
    adapter_of: Annotated[str | None, AfterValidator(_check_base)] = None
    """The version, ``model@vN``, whose weights this one adapts; None for a whole model."""
    metrics: dict[str, float] = Field(default_factory=dict)
    lineage: Lineage = Lineage()


class ModelVersion(VersionSpec):
    """A published version: the content of ``manifest.json``. Immutable."""

    manifest_format: Literal[1, 2] = 2
    """Format of this file; grows when a field is added."""
    name: str
    version: str
    format: Literal["safetensors"] = "safetensors"
    files: tuple[FileEntry, ...]
    created: int
    """Unix time of publication, seconds."""

    @property
    def reference(self) -> str:
        """``name@version``, as sources and command lines write it."""
        return f"{self.name}@{self.version}"

    @property
    def number(self) -> int:
        """The N of ``vN``."""
        return int(self.version[1:])

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.size for entry in self.files)

    @property
    def content_digest(self) -> str:
        """Hex digest of what makes two versions the same; see :func:`content_digest`."""
        return content_digest(self.files, self)

    def file(self, path: str) -> FileEntry:
        """The entry of ``path``; RegistryError naming the version's files when there is none."""
        for entry in self.files:
            if entry.path == path:
                return entry
        names = ", ".join(entry.path for entry in self.files)
        raise RegistryError(f"{self.reference} has no file {path!r}; it has {names}")

    def to_json(self) -> bytes:
        """The manifest's bytes: JSON, indented, keys in field order, newline at the end."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def content_digest(files: tuple[FileEntry, ...], spec: VersionSpec) -> str:
    """Hex sha256 over files, format, task, dtype, quantization, and an adapter's base; equal is the same version."""
    identity: dict[str, Any] = {
        "files": sorted((entry.path, entry.size, entry.sha256) for entry in files),
        "format": "safetensors",
        "task": spec.task,
        "dtype": spec.dtype,
        "quantization": spec.quantization,
    }
    if spec.adapter_of is not None:
        identity["adapter_of"] = spec.adapter_of
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def parse_manifest(data: bytes, place: str) -> ModelVersion:
    """The version in ``data``; RegistryError naming ``place`` and every wrong field.

    A field this program does not know is refused: it may change what the others mean.
    """
    try:
        return ModelVersion.model_validate_json(data)
    except ValidationError as error:
        raise RegistryError(f"{place} is not a manifest this Manta can read: {_describe(error)}") from error


def _describe(error: ValidationError) -> str:
    texts = []
    for detail in error.errors(include_url=False, include_context=False):
        field = ".".join(str(part) for part in detail["loc"]) or "file"
        if detail["type"] == "extra_forbidden" or field == "manifest_format":
            texts.append(
                f"unknown {field} (got {detail['input']!r}): a newer Manta wrote it; update this installation"
            )
        else:
            texts.append(f"{field}: {detail['msg']}")
    return "; ".join(texts)
