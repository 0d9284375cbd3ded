"""The Ray actor that stands for a vLLM engine: placed as a stage is, it runs vLLM as a process of another Python.

vLLM's pins clash with Ray's and Manta's, so it lives in an environment of its own, which the config names. The
process talks to the replica over the Channel as any stage does; the actor only starts it, and takes it along when it
ends itself.
"""

import ctypes.util
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray

import deployments
from cluster.control.code import check_code_digest
from cluster.plan.types import ModelAppArgs
from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from cluster.telemetry.log import log_to_stderr
from deployments.stage.link import StageAddress

_TOLD_LINES = 20
_LAST_WORDS_S = 5.0


class VllmActor:
    """The only stage of a replica with ``engine: vllm``; called as :class:`deployments.stage.actor.StageActor` is."""

    def __init__(self, args: ModelAppArgs, index: int) -> None:
        assert index == 0, "vLLM is one stage; this is a bug"
        self._args = args
        self._process: VllmProcess | None = None

    def start(self) -> StageAddress:
        """Start vLLM unless it runs, and have it listen anew; raises RuntimeError with its last words if it dies."""
        begin = time.monotonic()
        if self._process is None or not self._process.lives:
            log_to_stderr(model=self._args.model, version=self._args.version, stage=0)
            check_code_digest(self._args.code_digest)
            registry = Registry(self._args.storage)
            name = self._args.registry_name or self._args.model
            directory = materialize(registry, registry.get(name, self._args.version))
            self._process = VllmProcess(self._args, directory, code_folder(registry.cache))
        load_s = time.monotonic() - begin
        address, secret = self._process.listen(ray.util.get_node_ip_address())
        return StageAddress(
            address=address,
            secret=secret,
            node_id=ray.get_runtime_context().get_node_id(),
            pid=self._process.pid,
            process_started_at=psutil.Process(self._process.pid).create_time(),
            load_s=load_s,
        )

    def serve(self) -> None:
        """Serving began with :meth:`start`."""


class VllmProcess:
    """One run of :mod:`deployments.stage.vllm_process`, ready when made; it ends with this process."""

    def __init__(self, args: ModelAppArgs, directory: Path, code: Path) -> None:
        """``directory`` has the model's files, ``code`` the package; RuntimeError when vLLM does not start."""
        assert args.vllm is not None, "only a model with engine vllm has this stage; this is a bug"
        self._python = args.vllm.python
        self._last_lines: deque[str] = deque(maxlen=_TOLD_LINES)
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the interpreter that the config names
                [self._python, "-m", "deployments.stage.vllm_process"],
                cwd=code,
                env=environment(os.environ, args, str(code)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise RuntimeError(
                f"models.{args.model}.engine.python: {self._python} cannot be run on this node: {error}; "
                "install vLLM's environment at this path on every node that may hold the model"
            ) from error
        self._passing_on = threading.Thread(target=self._pass_on, daemon=True)
        self._passing_on.start()
        self._ask(json.dumps(settings_of(args, directory)))

    def _pass_on(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last_lines.append(line)
            sys.stderr.write(line)

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            status = self.end(_LAST_WORDS_S)
            told = "".join(self._last_lines).strip()
            raise RuntimeError(f"vLLM ({self._python}) ended with status {status}; its last words:\n{told}")
        found: dict[str, Any] = json.loads(answer)
        return found

    @property
    def lives(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def end(self, grace_s: float = 0.0) -> int:
        """Kill it, unless it ends by itself in time; returns its exit status. It also ends when this process does."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        self._process.kill()
        status = self._process.wait()
        self._passing_on.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        return status

    def listen(self, host: str) -> tuple[str, bytes]:
        """Forget every sequence and listen on ``host`` for the replica; returns the address and its secret."""
        answer = self._ask(host)
        return answer["address"], bytes.fromhex(answer["secret"])


def code_folder(cache: Path) -> Path:
    """A folder in ``cache`` that has the package ``deployments`` of this process, and nothing else to import.

    The rest of our environment must not come before vLLM's own. The folder stays, one for each package.
    """
    package = Path(deployments.__file__).parent
    folder = cache / "vllm" / hashlib.sha256(str(package).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (folder / "deployments").symlink_to(package)
    return folder


def settings_of(args: ModelAppArgs, directory: Path) -> dict[str, object]:
    """What the process is told, see :class:`deployments.runtime.vllm_runner.VllmSettings`."""
    assert args.vllm is not None
    return {
        "directory": str(directory),
        "dtype": args.dtype,
        "context_tokens": args.context_tokens,
        "kv_bytes": args.stages[0].kv_bytes,
        "prefix_caching": args.prefix_caching,
        "max_running": args.max_running,
        "max_step_tokens": args.max_step_tokens,
        "compile": args.vllm.compile,
    }


def environment(current: Mapping[str, str], args: ModelAppArgs, code: str) -> dict[str, str]:
    """The process's environment: ``code`` is the folder that Manta's package is imported from.

    The engine runs inside the process (no children that could outlive it), threads where the system puts them, and
    nothing is looked up or reported elsewhere. On CPUs its guide preloads tcmalloc and Intel's OpenMP; done where
    both are there.
    """
    assert args.vllm is not None
    threads = str(args.threads_per_stage)
    found = dict(current) | {
        "PYTHONPATH": code,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "MKL_DYNAMIC": "FALSE",  # else it takes fewer than it is told, and vLLM stops at the difference
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if args.device == "cpu" and (libraries := preloads(Path(args.vllm.python))):
        found["LD_PRELOAD"] = ":".join(libraries)
    return found


def preloads(python: Path) -> list[str]:
    """The libraries to load before vLLM on a CPU; none unless all of them are there."""
    allocator = ctypes.util.find_library("tcmalloc_minimal")
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    return [allocator, str(openmp)] if allocator is not None and openmp.exists() else []
