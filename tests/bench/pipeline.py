"""``python -m tests.bench pipeline``: two stages of one thread beside one stage of two threads, in process, in turns.

Per stage it prints which part of the time it computed and waited, which part of it was bubble (waiting while the
pipeline had work under way), and how long it took to send its results on, which runs beside the next step.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop
import yaml
from rich.console import Console
from rich.table import Table

from cluster.plan.types import ModelAppArgs
from tests.bench.closed_loop import Point, measure, turns
from tests.bench.figures import ratio
from tests.bench.in_process import (
    LocalRay,
    ReplicaSource,
    local_ray,
    model_args,
    replica,
    stage_samples,
)
from tests.bench.layers import firsts, median, rates, verdict
from tests.bench.machine import CpuClock
from tests.bench.servers import MODEL, checkpoint_of
from tests.bench.stage_shares import StageTotals, stage_shares
from tests.bench.start import QUICKSTART, STORAGE
from tests.bench.workloads import PromptSource, Workload, chat_like

GOAL = 0.95
GOAL_FROM_STREAMS = 8
LAYOUTS = {"1 x 2": {"stages": 1, "threads": 2}, "2 x 1": {"stages": 2, "threads": 1}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """One point, and how each stage spent its window, as parts of 1."""

    layout: str
    num_streams: int
    point: Point
    stages: StageTotals


def main() -> None:
    """Measure both layouts in turns, print the tables, write the JSON."""
    arguments = parse()
    layouts = layout_args(arguments.config, arguments.quantization, arguments.storage)
    with local_ray(num_replicas=len(layouts)) as local:
        found = uvloop.run(measure_all(layouts, local, arguments))
    console = Console(width=150)
    console.print(speed_table(found))
    console.print(stage_table(found))
    arguments.out.write_text(json.dumps([asdict(each) for each in found]))


def layout_args(config: Path, quantization: str | None, storage: Path) -> dict[str, ModelAppArgs]:
    """The arguments of one replica in each of :data:`LAYOUTS`, of the first model in ``config``."""
    model = yaml.safe_load(config.read_text())["models"][0] | {"name": MODEL}
    if quantization:
        model["quantization"] = quantization
    return {layout: model_args(model | {"pipeline": pipeline}, storage) for layout, pipeline in LAYOUTS.items()}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.bench pipeline")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--storage", type=Path, default=STORAGE, help="Manta's storage, where the model is")
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="YAML whose first model is measured")
    parser.add_argument("--quantization", choices=["int8", "int4"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a window")
    # a stage's wait while the other layout was asked is exported up to two seconds after its next step
    parser.add_argument("--warm-up", type=float, default=4.0, help="seconds before it, at least")
    parser.add_argument("--out", type=Path, default=Path("bench-pipeline.json"))
    return parser.parse_args()


async def measure_all(
    layouts: Mapping[str, ModelAppArgs], local: LocalRay, arguments: argparse.Namespace
) -> list[Shared]:
    """Both layouts, which are up all the time, at every number of streams."""
    prompts = PromptSource(checkpoint_of(arguments.storage))
    found: list[Shared] = []
    async with AsyncExitStack() as stack:
        services = {
            name: await stack.enter_async_context(replica(args, f"bench-{number}"))
            for number, (name, args) in enumerate(layouts.items())
        }
        for workload in (chat_like(f"P{number}", number) for number in arguments.streams):
            for number, layout in turns(list(layouts), arguments.rounds):
                source, lines = ReplicaSource(services[layout]), prompts.prompts(workload, number)
                shared = await measure_one(layout, source, workload, lines, local, arguments)
                found.append(shared)
                print(f"[{number + 1}] {layout} at {workload.num_streams}: {shared.point}", flush=True)
    return found


async def measure_one(
    layout: str,
    source: ReplicaSource,
    workload: Workload,
    prompts: Iterator[str],
    local: LocalRay,
    arguments: argparse.Namespace,
) -> Shared:
    """One window of one layout."""
    async with stage_samples(local) as samples:
        point = await measure(
            source,
            workload,
            prompts,
            clock=CpuClock(local.roots),
            warm_up_s=arguments.warm_up,
            seconds=arguments.seconds,
        )
        stop_s = time.perf_counter()
    stages = stage_shares(samples, stop_s - arguments.seconds, stop_s)
    return Shared(layout=layout, num_streams=workload.num_streams, point=point, stages=stages)


def speed_table(found: list[Shared]) -> Table:
    """Throughput of both layouts, their ratio, and whether it reaches the goal."""
    table = Table(
        "streams", "1 x 2 tok/s", "2 x 1 tok/s", "ratio", "spread", f"goal >= {GOAL:g} from {GOAL_FROM_STREAMS}",
        "TTFT p50 1 x 2", "TTFT p50 2 x 1", "errors", title="one stage of two threads, two of one",
    )  # fmt: skip
    for num_streams in dict.fromkeys(each.num_streams for each in found):
        one, two = (
            [each.point for each in found if (each.layout, each.num_streams) == (layout, num_streams)]
            for layout in LAYOUTS
        )
        kept = ratio(rates(two), rates(one))
        table.add_row(
            str(num_streams),
            f"{median(rates(one)):.1f}",
            f"{median(rates(two)):.1f}",
            f"{kept.value:.3f}",
            f"{kept.lowest:.3f}..{kept.highest:.3f}",
            verdict(kept.value >= GOAL) if num_streams >= GOAL_FROM_STREAMS else "",
            f"{median(firsts(one)):.0f}",
            f"{median(firsts(two)):.0f}",
            str(sum(point.figures.num_errors for point in (*one, *two))),
        )
    return table


def stage_table(found: list[Shared]) -> Table:
    """How every stage spent its time, medians of the rounds."""
    kinds = sorted({kind for each in found for shares in each.stages.values() for kind in shares})
    table = Table("layout", "streams", "stage", *kinds, title="where the stages' time went (% of the window)")
    for layout, num_streams in dict.fromkeys((each.layout, each.num_streams) for each in found):
        group = [each for each in found if (each.layout, each.num_streams) == (layout, num_streams)]
        for stage in sorted(group[0].stages):
            shares = [[each.stages[stage].get(kind, 0.0) for each in group] for kind in kinds]
            table.add_row(layout, str(num_streams), str(stage), *(f"{median(each):.1%}" for each in shares))
    return table


if __name__ == "__main__":
    main()
