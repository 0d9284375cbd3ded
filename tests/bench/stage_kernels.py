"""``python -m tests.bench stage_kernels``: what the kernels allow two stages of one thread, beside one stage of two.

Nothing but decoding steps, 192 tokens deep: one stage computes all streams, two compute a half each at the same time.
A round of tokens takes the one stage a step and the two stages two steps of the slower one, without any waiting in
between, so the ratio is the most that a pipeline of these kernels can reach in decoding on this machine.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cluster.plan.types import ModelAppArgs
from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from deployments.runtime.runner import load_slice
from deployments.stage.loaded import runner_config
from tests.bench.closed_loop import turns
from tests.bench.figures import ratio
from tests.bench.kernels import decoding
from tests.bench.layers import median
from tests.bench.pipeline import LAYOUTS, layout_args
from tests.bench.start import QUICKSTART, STORAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Compute a decoding step of ``num_rows`` again and again for ``seconds``."""

    num_rows: int
    seconds: float


def main() -> None:
    """Measure both layouts in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.bench stage_kernels")
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--storage", type=Path, default=STORAGE, help="Manta's storage, where the model is")
    parser.add_argument("--quantization", choices=["int8", "int4"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window")
    arguments = parser.parse_args()
    layouts = layout_args(QUICKSTART, arguments.quantization, arguments.storage)
    table = Table("streams", *(f"{layout}: ms a round" for layout in LAYOUTS), "ratio at best", "spread")
    with stages(layouts["1 x 2"]) as one, stages(layouts["2 x 1"]) as two:
        for num_streams in arguments.streams:
            rounds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
            for _, (layout, connections) in turns([("1 x 2", one), ("2 x 1", two)], arguments.rounds):
                rounds[layout].append(round_s(connections, num_streams, arguments.seconds))
            table.add_row(str(num_streams), *compare(rounds["1 x 2"], rounds["2 x 1"]))
    Console().print(table)


def compare(one_s: list[float], two_s: list[float]) -> tuple[str, str, str, str]:
    """Medians in milliseconds, and how the rates relate."""
    kept = ratio([1 / seconds for seconds in two_s], [1 / seconds for seconds in one_s])
    return (
        f"{median(one_s) * 1e3:.1f}",
        f"{median(two_s) * 1e3:.1f}",
        f"{kept.value:.2f}",
        f"{kept.lowest:.2f}..{kept.highest:.2f}",
    )


def round_s(connections: Sequence[Connection], num_streams: int, seconds: float) -> float:
    """Seconds in which every stream gets a token, by the slowest stage's median step."""
    order = Order(num_rows=-(-num_streams // len(connections)), seconds=seconds)
    for connection in connections:
        connection.send(order)
    return len(connections) * max(float(connection.recv()) for connection in connections)


@contextmanager
def stages(args: ModelAppArgs) -> Iterator[list[Connection]]:
    """A process for each stage, which has loaded it; they end with the block."""
    context = multiprocessing.get_context("spawn")
    connections = []
    processes = []
    for index in range(len(args.stages)):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(args, index, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a process that dies ends the waiting for it
        connections.append(ours)
    try:
        for connection in connections:
            connection.recv()
        yield connections
    finally:
        for process in processes:
            process.terminate()
            process.join()


@torch.inference_mode()
def serve(args: ModelAppArgs, index: int, orders: Connection) -> None:
    """Load a stage, say so, and answer orders with the median of its steps in seconds, until it is ended."""
    registry = Registry(args.storage)
    directory = materialize(registry, registry.resolve(f"{args.model}@{args.version}"))
    loaded = load_slice(runner_config(args, index, directory))
    orders.send("loaded")
    while True:
        order: Order = orders.recv()
        step = decoding(order.num_rows)
        hidden = None if index == 0 else torch.zeros(order.num_rows, loaded.hidden_size, dtype=loaded.dtype)
        times_s = []
        begin_s = time.perf_counter()
        while (start_s := time.perf_counter()) < begin_s + order.seconds:
            loaded.compute(step, hidden, every_row=False)
            times_s.append(time.perf_counter() - start_s)
        orders.send(statistics.median(times_s))


if __name__ == "__main__":
    main()
