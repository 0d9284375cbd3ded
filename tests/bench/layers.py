"""``python -m tests.bench layers``: what Serve and the gateway add to the engine, in first tokens and throughput.

The same replica is driven twice: in this process (no gateway, no Serve, no HTTP), and through the whole stack with
HTTP and server-sent events. Both are up all the time and get the same prompts, 128 tokens in and 128 out, in turns.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import uvloop
import yaml
from rich.console import Console
from rich.table import Table

from cluster.plan.types import ModelAppArgs
from tests.bench.closed_loop import Point, Source, measure, turns
from tests.bench.figures import Ratio, ratio
from tests.bench.http_client import CompletionsServer
from tests.bench.in_process import LocalRay, ReplicaSource, local_ray, model_args, replica
from tests.bench.machine import CpuClock
from tests.bench.servers import MODEL, MantaServer, Running, checkpoint_of
from tests.bench.start import QUICKSTART, STORAGE
from tests.bench.workloads import PromptSource, chat_like

GOAL_ADDED_MS = 10.0
GOAL_KEPT = 0.95

Found = dict[int, dict[str, list[Point]]]
"""By number of streams and side, one point per round."""


def main() -> None:
    """Measure both sides in turns, print the table, write the JSON."""
    arguments = parse()
    base = yaml.safe_load(arguments.config.read_text())["models"][0] | {"name": MODEL}
    model = base | {"pipeline": {"stages": 1}}
    server = MantaServer(variant="layers", model=model, storage=arguments.storage)
    with ExitStack() as stack:
        logs = stack.enter_context(tempfile.TemporaryDirectory(prefix="manta-bench-"))
        running = stack.enter_context(server.running(Path(logs)))
        local = stack.enter_context(local_ray())
        found = uvloop.run(measure_both(running, local, model_args(model, arguments.storage), arguments))
    Console(width=150).print(layers_table(found))
    arguments.out.write_text(
        json.dumps({n: {side: [asdict(p) for p in ps] for side, ps in sides.items()} for n, sides in found.items()})
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.bench layers")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--storage", type=Path, default=STORAGE, help="Manta's storage, where the model is")
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="YAML whose first model is measured")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a window")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds before it, at least")
    parser.add_argument("--out", type=Path, default=Path("bench-layers.json"))
    return parser.parse_args()


async def measure_both(running: Running, local: LocalRay, args: ModelAppArgs, arguments: argparse.Namespace) -> Found:
    """The engine alone and the whole stack, at every number of streams."""
    prompts = PromptSource(checkpoint_of(arguments.storage))
    found: Found = {}
    async with replica(args) as service:
        sides: list[tuple[str, Source, CpuClock]] = [
            ("engine", ReplicaSource(service), CpuClock(local.roots)),
            ("stack", CompletionsServer(url=running.url, model=MODEL), CpuClock(running.roots)),
        ]
        for workload in (chat_like(f"L{number}", number) for number in arguments.streams):
            points = found.setdefault(workload.num_streams, {"engine": [], "stack": []})
            for number, (name, source, clock) in turns(sides, arguments.rounds):
                point = await measure(
                    source,
                    workload,
                    prompts.prompts(workload, number),
                    clock=clock,
                    warm_up_s=arguments.warm_up,
                    seconds=arguments.seconds,
                )
                points[name].append(point)
                print(f"[{number + 1}] {name} at {workload.num_streams}: {point}", flush=True)
    return found


def layers_table(found: Found) -> Table:
    """One line per number of streams; medians of the rounds."""
    table = Table("streams", "engine tok/s", "stack tok/s", "kept", "spread", f"goal >= {GOAL_KEPT:g}",
                  "engine TTFT p50", "stack TTFT p50", "added ms", f"goal <= {GOAL_ADDED_MS:g}",
                  "engine / stack CPU s per 1000 tokens", title="what the layers above the engine cost")  # fmt: skip
    for num_streams, sides in found.items():
        engine, stack = sides["engine"], sides["stack"]
        kept = ratio(rates(stack), rates(engine))
        added_ms = median(added_to_firsts(stack, engine))
        table.add_row(
            str(num_streams),
            f"{median(rates(engine)):.1f}",
            f"{median(rates(stack)):.1f}",
            *kept_cells(kept),
            f"{median(firsts(engine)):.1f}",
            f"{median(firsts(stack)):.1f}",
            f"{added_ms:+.1f}",
            verdict(added_ms <= GOAL_ADDED_MS),
            f"{median(cpu_per_thousand(engine)):.2f} / {median(cpu_per_thousand(stack)):.2f}",
        )
    return table


def kept_cells(kept: Ratio) -> list[str]:
    """Ratio, spread, verdict."""
    return [f"{kept.value:.3f}", f"{kept.lowest:.3f}..{kept.highest:.3f}", verdict(kept.value >= GOAL_KEPT)]


def verdict(met: bool) -> str:
    """For a cell."""
    return "[green]met[/]" if met else "[red]missed[/]"


def median(values: list[float]) -> float:
    """Of what there is; not a number when there is nothing."""
    return statistics.median(values) if values else float("nan")


def rates(points: list[Point]) -> list[float]:
    """Tokens per second of each round."""
    return [point.figures.tokens_per_s for point in points]


def firsts(points: list[Point]) -> list[float]:
    """Median time to the first token of each round in which there was one, ms."""
    return [point.figures.first_token.p50_ms for point in points if point.figures.first_token is not None]


def added_to_firsts(stack: list[Point], engine: list[Point]) -> list[float]:
    """By how much the median first token comes later, ms, of each round in which both sides had one."""
    pairs = zip(
        (point.figures.first_token for point in stack), (point.figures.first_token for point in engine), strict=True
    )
    return [ours.p50_ms - theirs.p50_ms for ours, theirs in pairs if ours is not None and theirs is not None]


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
