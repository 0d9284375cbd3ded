"""The C++ sources in, a loaded shared library out; compiled once per machine, compiler and source.

The library lies in ``~/.cache/manta/kernels/<digest>/``. It is compiled for the processor it is compiled on, so the
digest also covers the processor's flags: a home directory shared by different machines is safe.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from deployments.runtime.native.architecture import NotNativeError

SOURCE_SUFFIXES = (".cpp", ".h")
CACHE = Path(".cache") / "manta" / "kernels"
NEEDED_FLAGS = frozenset({
    "amx_tile", "amx_bf16", "amx_int8",
    "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512vbmi", "fma",
})  # fmt: skip
_COMPILERS = ("g++", "clang++", "c++")
_OPTIONS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
_COMPILE_TIMEOUT_S = 300.0


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What Linux says this processor can do; empty on other systems."""
    if not cpuinfo.is_file():
        return frozenset()
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    return frozenset(next(lines, ":").partition(":")[2].split())


def check_processor(flags: frozenset[str]) -> None:
    """Raise NotNativeError naming what the processor lacks."""
    missing = sorted(NEEDED_FLAGS - flags)
    if missing:
        raise NotNativeError(f"this processor has no {', '.join(missing)}")


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library, compiled first where it has not been yet; raises NotNativeError.

    Every thread made afterwards may use the tile registers.
    """
    check_processor(processor_flags())
    library = ctypes.CDLL(str(build(Path.home() / CACHE)))
    if library.manta_request_tiles() != 0:
        raise NotNativeError("the kernel does not give this process the processor's tile registers")
    return library


def build(cache: Path, *, options: tuple[str, ...] = _OPTIONS) -> Path:
    """Path of the library under ``cache``; raises NotNativeError when it cannot be made."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise NotNativeError(f"no C++ compiler ({', '.join(_COMPILERS)}) is on the path; install one, e.g. g++")
    try:
        directory = cache / _digest(compiler, options)
        library = directory / "slice.so"
        if library.is_file():
            return library
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.is_file():
                _compile(compiler, options, library)
    except OSError as error:
        raise NotNativeError(f"the kernels cannot be kept in {cache}: {error}") from error
    return library


def _digest(compiler: str, options: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=60)  # noqa: S603
    digest = hashlib.sha256(version.stdout)
    digest.update("\0".join((compiler, *options, *sorted(processor_flags()))).encode())
    for source in sorted(Path(__file__).parent.iterdir()):
        if source.suffix in SOURCE_SUFFIXES:
            digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _compile(compiler: str, options: tuple[str, ...], library: Path) -> None:
    """Under another name first: a library that exists is whole."""
    unfinished = library.with_name(f"unfinished-{os.getpid()}.so")
    command = [compiler, *options, "-o", str(unfinished), str(Path(__file__).with_name("slice.cpp"))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMPILE_TIMEOUT_S)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise NotNativeError(f"{compiler} did not finish within {_COMPILE_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise NotNativeError(f"{compiler} cannot compile the kernels: {lines[0] if lines else done.returncode}")
    unfinished.rename(library)
