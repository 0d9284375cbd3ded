"""``python -m tests.bench uneven``: steps per second of parameter_server against ddp when one worker is slow.

The tiny model, whose computing is nothing beside the sleep of each micro-batch: it shows who waits for whom.
"""

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from cluster.runs.files import LOG
from tests.support.tiny_task import TinyShards, TinyTask, tiny_spec
from tests.support.train_workers import Case, run_cases
from train_jobs.trainer.spec import BatchSpec, CheckpointSpec, Ddp, DurationSpec, ParameterServer, StrategySpec
from train_jobs.trainer.task import LossParts, MicroBatch
from train_jobs.trainer.world import World

NUM_WORKERS = 3
STRATEGIES: dict[str, StrategySpec] = {
    "ddp": Ddp(),
    "parameter_server, max_staleness 4": ParameterServer(max_staleness=4),
    "parameter_server, max_staleness 8": ParameterServer(max_staleness=8),
    "parameter_server, no bound": ParameterServer(max_staleness=None),
}


class SleepyTask(TinyTask):
    """The tiny task, each of whose micro-batches takes a while more."""

    def __init__(self, sleep_s: float) -> None:
        super().__init__()
        self._sleep_s = sleep_s

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> LossParts:
        """Of the tiny task, after a sleep."""
        time.sleep(self._sleep_s)
        return super().loss(model, micro_batch)


def materials(sleep_s: float, slow_sleep_s: float) -> tuple[Any, Any, Any]:
    """Task and data; the last worker is the slow one."""
    is_slow = World.current().rank == NUM_WORKERS - 1
    return SleepyTask(slow_sleep_s if is_slow else sleep_s), TinyShards(), None


def steps_per_second(run_dir: Path) -> float:
    """From the end of the first step to that of the last."""
    times = [json.loads(line)["time"] for line in (run_dir / LOG).read_text().splitlines()]
    return (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    """Measure one after the other, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.bench uneven")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sleep", type=float, default=0.05, help="of a micro-batch, in seconds")
    parser.add_argument("--slow-sleep", type=float, default=0.5, help="the same on the last worker")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            name: Case(
                spec=tiny_spec(
                    strategy=strategy,
                    batch=BatchSpec(sequences=24, micro_sequences=2),
                    duration=DurationSpec(kind="steps", amount=arguments.steps),
                    checkpoint=CheckpointSpec(every_steps=arguments.steps, keep_last=1, keep_best=0),
                ),
                run_dir=Path(folder) / str(number),
                setup=functools.partial(materials, arguments.sleep, arguments.slow_sleep),
            )
            for number, (name, strategy) in enumerate(STRATEGIES.items())
        }
        run_cases(NUM_WORKERS, Path(folder) / "workers", list(cases.values()))
        found = {name: steps_per_second(case.run_dir) for name, case in cases.items()}
    shown = Table("strategy", "steps/s", "against ddp", title=f"{NUM_WORKERS} workers, the last one slow")
    for name, rate in found.items():
        shown.add_row(name, f"{rate:.2f}", f"{rate / found['ddp']:.2f}")
    Console(width=80).print(shown)


if __name__ == "__main__":
    main()
