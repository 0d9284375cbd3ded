"""``python -m tests.bench kernels``: milliseconds of one step in one stage, native kernels beside torch.

A row is a number format and a number of threads. Columns are decoding steps of so many sequences with 192 tokens
of context each, and one prompt of 512 tokens. ``of reading`` is how fast a step of one row goes through the weights,
as a share of how fast as many threads read plain memory in the same run. A figure is the least of its repeats: other
work on the machine only adds.
"""

import argparse
import ctypes
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from deployments.messages import SequenceStep
from deployments.runtime.quantize import Quantization
from deployments.runtime.runner import LoadedSlice, load_slice
from deployments.runtime.settings import Kernels, RunnerConfig, StageSlice

STORAGE = Path.home() / ".cache" / "manta-tests"
MODEL = "smollm2"
NUM_LAYERS = 30
BLOCK_TOKENS = 16
CONTEXT = 192
PROMPT = 512
BATCHES = (1, 8, 16, 32)
READ_BYTES = 256 << 20
FORMATS: tuple[Quantization | None, ...] = (None, "int8", "int4")


def main() -> None:
    """Measure and print; the model must be in the registry (any other benchmark or test brings it there)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default=str(STORAGE), help="root of the registry that holds smollm2")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    registry = Registry(options.storage)
    directory = materialize(registry, registry.resolve(f"{MODEL}@latest"))
    columns = [f"{batch} rows" for batch in BATCHES]
    table = Table("kernels", "threads", "weights", *columns, f"prompt of {PROMPT}", "of reading")
    for num_threads in options.threads:
        read_gb_s = READ_BYTES / least_s(lambda n=num_threads: read_memory(n), options.repeats) / 1e9
        for quantization in FORMATS:
            table.add_row(*measure(directory, num_threads, options.repeats, read_gb_s, "native", quantization))
        torch.set_num_threads(num_threads)
        table.add_row(*measure(directory, num_threads, max(3, options.repeats // 5), read_gb_s, "torch", None))
    Console().print(table)


def measure(
    directory: Path,
    num_threads: int,
    repeats: int,
    read_gb_s: float,
    kernels: Kernels,
    quantization: Quantization | None,
) -> list[str]:
    """One row of the table."""
    num_blocks = max(BATCHES) * (CONTEXT // BLOCK_TOKENS + 1)
    config = RunnerConfig(
        directory=directory,
        part=StageSlice(start=0, stop=NUM_LAYERS, is_first=True, is_last=True),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        context_tokens=2048,
        num_blocks=num_blocks,
        block_tokens=BLOCK_TOKENS,
        quantization=quantization,
        kernels=kernels,
        num_threads=num_threads,
    )
    loaded = load_slice(config)
    steps = [decoding(batch) for batch in BATCHES]
    times_s = [least_s(lambda step=step: compute(loaded, step), repeats) for step in (*steps, prompt())]
    read = f"{read_bytes(loaded, directory) / times_s[0] / 1e9 / read_gb_s:.0%}"
    times = [f"{seconds * 1e3:.1f}" for seconds in times_s]
    return [loaded.kernels, str(num_threads), f"{loaded.weight_bytes / 1e6:.0f} MB", *times, read]


def read_bytes(loaded: LoadedSlice, directory: Path) -> int:
    """Weights that a step goes through: of an embedding beside the output head it reads a row only."""
    config = json.loads((directory / "config.json").read_text())
    embedding = config["vocab_size"] * config["hidden_size"] * torch.bfloat16.itemsize
    separate = loaded.kernels in ("amx-int8", "amx-int4") or not config["tie_word_embeddings"]
    return loaded.weight_bytes - (embedding if separate else 0)


@torch.inference_mode()
def compute(loaded: LoadedSlice, step: list[SequenceStep]) -> None:
    """One step."""
    loaded.compute(step, None, every_row=False)


def decoding(batch: int) -> list[SequenceStep]:
    """One new token each; nothing was computed before, but the work is the same."""
    per = CONTEXT // BLOCK_TOKENS + 1
    return [
        SequenceStep(number, (100 + number,), CONTEXT, tuple(range(number * per, (number + 1) * per)), True)
        for number in range(batch)
    ]


def prompt() -> list[SequenceStep]:
    """A whole prompt at once."""
    return [SequenceStep(0, tuple(range(100, 100 + PROMPT)), 0, tuple(range(PROMPT // BLOCK_TOKENS)), True)]


def least_s(work: Callable[[], None], repeats: int) -> float:
    """Least wall time of ``repeats`` runs, after one to warm up, in seconds."""
    work()
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


_memory = ctypes.create_string_buffer(READ_BYTES)
ctypes.memset(_memory, 2, READ_BYTES)  # pages that were never written share one page of zeros


def read_memory(num_threads: int) -> None:
    """Look through the memory for a byte that is not there, each thread through its part."""
    libc = ctypes.CDLL(None)
    part = READ_BYTES // num_threads
    start = ctypes.addressof(_memory)

    def look(index: int) -> None:
        libc.memchr(ctypes.c_void_p(start + index * part), 1, ctypes.c_size_t(part - 1))

    threads = [threading.Thread(target=look, args=(index,)) for index in range(1, num_threads)]
    for thread in threads:
        thread.start()
    look(0)
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
