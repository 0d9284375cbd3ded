"""What downloads of packages share: the package's own client runs, watched, and the pinned digest is checked."""

import os
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster.errors import SourceError
from cluster.registry.progress import Progress
from cluster.registry.tree import file_sha256

_TAIL_LINES = 6
_POLL_S = 0.2


def download(client: str, command: list[str], package: str, folder: Path, *, remedy: str, progress: Progress) -> None:
    """Run ``command``, by which ``client`` brings ``package`` into ``folder``.

    SourceError with the client's own words, then ``remedy``, when it fails.
    """
    label = f"downloading {package}"
    progress(label, 0, None, "B")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="client-") as temporary:
        status, errors = watch(
            command, Path(temporary), folder, lambda num_bytes: progress(label, num_bytes, None, "B")
        )
    if status != 0:
        tail = "\n".join(f"  {line}" for line in errors.strip().splitlines()[-_TAIL_LINES:])
        raise SourceError(f"{client} could not download {package} (exit status {status}):\n{tail}\n{remedy}")
    num_bytes = _bytes_below(folder)
    progress(label, num_bytes, num_bytes, "B")


def check_sha256(file: Path, expected: str | None) -> str:
    """The hex sha256 of ``file``; SourceError when ``expected`` is another one."""
    actual = file_sha256(file)
    if expected is not None and actual != expected:
        raise SourceError(
            f"{file.name}: sha256 is {actual}, but {expected} is pinned; "
            "the file is not the one that was pinned: check where it comes from before changing the pin"
        )
    return actual


def watch(command: list[str], temporary: Path, folder: Path, show: Callable[[int], None]) -> tuple[int, str]:
    """Exit status and standard error of ``command``, which writes to ``temporary``, then to ``folder``.

    ``show`` gets the bytes of a download several times a second. pip writes a wheel to TMPDIR first and copies it
    to its place then, so the larger of the two folders is what was downloaded.
    """
    environment = os.environ | {"TMPDIR": str(temporary)}
    with (
        tempfile.TemporaryFile(dir=temporary) as errors,
        subprocess.Popen(  # noqa: S603 (a package client; the requirement is parsed)
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=environment
        ) as child,
    ):
        try:
            while _is_running(child):
                show(max(_bytes_below(temporary), _bytes_below(folder)))
        except BaseException:
            child.kill()  # what it left is swept with the work folder
            raise
        errors.seek(0)
        return child.returncode, errors.read().decode(errors="replace")


def _is_running(child: subprocess.Popen[bytes]) -> bool:
    try:
        child.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _bytes_below(folder: Path) -> int:
    """Bytes of the files below ``folder``; one that goes away meanwhile counts as nothing."""
    total_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total_bytes += os.lstat(os.path.join(parent, name)).st_size
    return total_bytes
