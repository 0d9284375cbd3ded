"""What code runs: the three packages as they are installed in, one digest out.

The digest travels in the plan; a replica or worker that runs other code refuses to start, and changed code makes a
changed application, which Serve then redeploys.
"""

import hashlib
import subprocess
from pathlib import Path

import cluster
from cluster.errors import ControlError

PACKAGES = ("cluster", "deployments", "train_jobs")
SUFFIXES = (".py", ".cpp", ".h")


def install_root() -> Path:
    """Directory that holds the three packages of this process."""
    return Path(cluster.__file__).resolve().parent.parent


def code_digest(root: Path | None = None) -> str:
    """SHA-256 over path and bytes of every source file (Python, C++) of the three packages, in order of paths."""
    root = root or install_root()
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(path for path in (root / package).rglob("*") if path.suffix in SUFFIXES):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def git_commit() -> str | None:
    """Commit that this process's code is a checkout of, with ``-dirty`` when it was changed since; None elsewhere."""
    root = str(install_root())
    if _git(root, "ls-files", "--error-unmatch", "cluster/__init__.py") is None:
        return None  # installed, perhaps below somebody else's checkout
    return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", *words], capture_output=True, text=True, check=False)  # noqa: S603, S607
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_code_digest(planned: str) -> None:
    """Refuse to run under a plan that other code made: ControlError with both digests and the remedy.

    The planned code is what was tested together; other code on a node is an old installation, or another package of
    the same name that stands first on ``sys.path``.
    """
    actual = code_digest()
    if actual != planned:
        raise ControlError(
            f"this process runs other code than the plan was made with: {actual[:12]} from {install_root()}, planned "
            f"{planned[:12]}; install the same version on every node, then run `manta up` again"
        )
