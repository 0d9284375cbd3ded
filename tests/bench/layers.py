"""``python -m tests.bench layers``: what Serve and the gateway add to the engine, in first tokens and throughput.

The same replica is driven twice: in this process (no gateway, no Serve, no HTTP), and through the whole stack with
HTTP and server-sent events. Both get the same prompts, 128 tokens in and 128 out, in turns.
"""

import argparse
import asyncio
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop
import yaml
from rich.console import Console
from rich.table import Table

from tests.bench.closed_loop import Point, measure
from tests.bench.figures import Ratio, ratio
from tests.bench.http_client import CompletionsServer
from tests.bench.in_process import LocalRay, ReplicaSource, local_ray, model_args, replica
from tests.bench.machine import CpuClock
from tests.bench.servers import MODEL, MantaServer, checkpoint_of
from tests.bench.start import QUICKSTART, STORAGE
from tests.bench.workloads import PromptSource, Workload, chat_like

GOAL_ADDED_MS = 10.0
GOAL_KEPT = 0.95

Points = dict[int, list[Point]]
"""By number of streams, one point per repeat."""


def main() -> None:
    """Measure both sides in turns, print the table, write the JSON."""
    arguments = parse()
    base = yaml.safe_load(arguments.config.read_text())["models"][0] | {"name": MODEL}
    model = base | {"pipeline": {"stages": 1}}
    loads = [chat_like(f"L{number}", number) for number in arguments.streams]
    inside: Points = {workload.num_streams: [] for workload in loads}
    through: Points = {workload.num_streams: [] for workload in loads}
    prompts = PromptSource(checkpoint_of(arguments.storage))
    for repeat in range(arguments.repeat):
        with local_ray() as local:
            args = model_args(model, arguments.storage)
            for points in uvloop.run(engine_points(local, args, loads, prompts, repeat, arguments)):
                inside[points[0].num_streams].append(points[1])
        for points in stack_points(model, loads, prompts, repeat, arguments):
            through[points[0].num_streams].append(points[1])
    Console(width=150).print(layers_table(inside, through))
    document = {"engine": inside, "stack": through}
    arguments.out.write_text(
        json.dumps({side: {n: [asdict(p) for p in ps] for n, ps in all_.items()} for side, all_ in document.items()})
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.bench layers")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--storage", type=Path, default=STORAGE, help="Manta's storage, where the model is")
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="YAML whose first model is measured")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15.0, help="length of a window")
    parser.add_argument("--warm-up", type=float, default=4.0, help="seconds before it, at least")
    parser.add_argument("--out", type=Path, default=Path("bench-layers.json"))
    return parser.parse_args()


async def engine_points(
    local: LocalRay,
    args: Any,
    loads: list[Workload],
    prompts: PromptSource,
    repeat: int,
    arguments: argparse.Namespace,
) -> list[tuple[Workload, Point]]:
    """The engine alone."""
    clock = CpuClock(local.roots)
    async with replica(args) as service:
        return [
            (
                workload,
                await measure(
                    ReplicaSource(service),
                    workload,
                    prompts.prompts(workload, repeat),
                    clock=clock,
                    warm_up_s=arguments.warm_up,
                    seconds=arguments.seconds,
                ),
            )
            for workload in loads
        ]


def stack_points(
    model: dict[str, Any], loads: list[Workload], prompts: PromptSource, repeat: int, arguments: argparse.Namespace
) -> list[tuple[Workload, Point]]:
    """The whole stack."""
    server = MantaServer(variant="layers", model=model, storage=arguments.storage)
    with tempfile.TemporaryDirectory(prefix="manta-bench-") as logs, server.running(Path(logs)) as running:
        source = CompletionsServer(url=running.url, model=MODEL)
        return [
            (
                workload,
                asyncio.run(
                    measure(
                        source,
                        workload,
                        prompts.prompts(workload, repeat),
                        clock=CpuClock(running.roots),
                        warm_up_s=arguments.warm_up,
                        seconds=arguments.seconds,
                    )
                ),
            )
            for workload in loads
        ]


def layers_table(inside: Points, through: Points) -> Table:
    """One line per number of streams."""
    table = Table("streams", "engine tok/s", "stack tok/s", "kept", "spread", f"goal >= {GOAL_KEPT:g}",
                  "engine TTFT p50", "stack TTFT p50", "added ms", f"goal <= {GOAL_ADDED_MS:g}",
                  "engine / stack CPU s per 1000 tokens", title="what the layers above the engine cost")  # fmt: skip
    for num_streams, engine in inside.items():
        stack = through[num_streams]
        kept = ratio(rates(stack), rates(engine))
        added_ms = mean(firsts(stack)) - mean(firsts(engine))
        table.add_row(
            str(num_streams),
            f"{mean(rates(engine)):.1f}",
            f"{mean(rates(stack)):.1f}",
            *kept_cells(kept),
            f"{mean(firsts(engine)):.1f}",
            f"{mean(firsts(stack)):.1f}",
            f"{added_ms:+.1f}",
            verdict(added_ms <= GOAL_ADDED_MS),
            f"{mean(cpu_per_thousand(engine)):.2f} / {mean(cpu_per_thousand(stack)):.2f}",
        )
    return table


def kept_cells(kept: Ratio) -> list[str]:
    """Ratio, spread, verdict."""
    return [f"{kept.value:.3f}", f"{kept.lowest:.3f}..{kept.highest:.3f}", verdict(kept.value >= GOAL_KEPT)]


def verdict(met: bool) -> str:
    """For a cell."""
    return "[green]met[/]" if met else "[red]missed[/]"


def mean(values: list[float]) -> float:
    """Of what there is."""
    return sum(values) / len(values) if values else float("nan")


def rates(points: list[Point]) -> list[float]:
    """Tokens per second of each repeat."""
    return [point.figures.tokens_per_s for point in points]


def firsts(points: list[Point]) -> list[float]:
    """Median time to the first token of each repeat, ms."""
    return [point.figures.first_token.p50_ms for point in points if point.figures.first_token is not None]


def cpu_per_thousand(points: list[Point]) -> list[float]:
    """CPU seconds of both sides, client included, per 1000 output tokens."""
    return [
        (sum(point.cpu.server_s.values()) + point.cpu.client_s)
        / (point.figures.tokens_per_s * point.cpu.wall_s)
        * 1000
        for point in points
    ]


if __name__ == "__main__":
    main()
