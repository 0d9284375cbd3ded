"""``python -m tests.bench training``: what the training loop adds to a bare torch loop, and what checkpoints hold up.

Both train the same small Llama on the same sequences in the same order, with the same optimizer and clipping, a step
of one after a step of the other in one process.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.runs.log import StepReport
from tests.support.tiny_task import TINY_SPEC
from train_jobs.data.sampler import Order
from train_jobs.trainer.checkpoint import Checkpoints
from train_jobs.trainer.committed import Meta
from train_jobs.trainer.hooks import NoHooks
from train_jobs.trainer.loop import Trainer
from train_jobs.trainer.spec import Adam, BatchSpec, CheckpointSpec, DurationSpec, ScheduleSpec, TrainSpec
from train_jobs.trainer.state import load_tensors, saved_tensors
from train_jobs.trainer.task import LossParts, MicroBatch
from train_jobs.trainer.world import World

VOCABULARY = 4096
GOALS = {"loop": 1.03, "stall": 0.10, "data wait": 0.02}


@dataclass(frozen=True)
class RandomSequences:
    """What the data give per read."""

    token_ids_BS: np.ndarray  # noqa: N815
    segments_BS: np.ndarray  # noqa: N815
    loss_mask_BS: np.ndarray  # noqa: N815


class RandomShards:
    """Random tokens without padding."""

    def __init__(self, num_sequences: int, sequence_tokens: int) -> None:
        self.sequence_tokens = sequence_tokens
        shape = (num_sequences, sequence_tokens)
        self._tokens = np.random.default_rng(0).integers(0, VOCABULARY, shape).astype(np.int32)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, indices: Any) -> RandomSequences:
        """Rows by number."""
        tokens = self._tokens[indices]
        return RandomSequences(tokens, np.ones_like(tokens), np.ones_like(tokens, dtype=np.uint8))


class LlamaTask:
    """Next-token prediction with a Llama of transformers."""

    def __init__(self, hidden_size: int) -> None:
        self.config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=6,
            num_attention_heads=hidden_size // 32,
            num_key_value_heads=hidden_size // 32,
        )

    def build_model(self, spec: TrainSpec) -> nn.Module:
        """Random under the seed."""
        torch.manual_seed(spec.seed)
        return LlamaForCausalLM(self.config)

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> LossParts:
        """Of all positions but the first."""
        total, count = loss_of(model, micro_batch["token_ids_BS"])
        return LossParts(sum=total, count=torch.tensor(float(count)))

    def evaluate(self, model: nn.Module, data: Any) -> Mapping[str, Any]:
        """Nothing is evaluated here."""
        return {}

    def export(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        """Nothing is exported here."""


def loss_of(model: nn.Module, token_ids_BS: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum of cross entropies, and how many."""
    logits_BSV = model(input_ids=token_ids_BS, use_cache=False).logits
    targets = token_ids_BS[:, 1:].flatten()
    return cross_entropy(logits_BSV[:, :-1].flatten(0, 1), targets, reduction="sum"), len(targets)


class BareLoop:
    """The shortest loop that does the same."""

    def __init__(self, task: LlamaTask, shards: RandomShards, spec: TrainSpec) -> None:
        assert isinstance(spec.optimizer, Adam)
        assert spec.clip_norm is not None
        self._shards, self._spec, self._clip_norm = shards, spec, spec.clip_norm
        self._model = task.build_model(spec)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=spec.optimizer.lr, weight_decay=0.01)
        self._order = Order(len(shards), spec.seed)

    def step(self, number: int) -> float:
        """Do step ``number``; the seconds it took."""
        batch = self._spec.batch
        began = time.perf_counter()
        ids = self._order.batch(number * batch.sequences, batch.sequences)
        tokens = torch.from_numpy(self._shards.read(ids).token_ids_BS.astype(np.int64))
        for part_BS in tokens.split(batch.micro_sequences):
            total, count = loss_of(self._model, part_BS)
            (total / (count * (batch.sequences // batch.micro_sequences))).backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        total.item()
        return time.perf_counter() - began


class StepTimes(NoHooks):
    """Seconds from the beginning of one step to the end of it, and the reports.

    Between two steps it lets the bare loop do one, so that both meet the same moods of the machine.
    """

    def __init__(self, bare: BareLoop | None = None) -> None:
        self.bare: list[float] = []
        self.ours: list[float] = []
        self.reports: list[StepReport] = []
        self._loop = bare
        self._began: float | None = None

    def heartbeat(self, step: int) -> None:
        """A step begins."""
        if self._began is not None:
            self.ours.append(time.perf_counter() - self._began)
        if self._loop is not None:
            self.bare.append(self._loop.step(step))
        self._began = time.perf_counter()

    def on_step(self, report: StepReport) -> None:
        """A step is done."""
        self.reports.append(report)


def trainer_steps(
    task: LlamaTask, shards: RandomShards, spec: TrainSpec, run_dir: Path, bare: BareLoop | None = None
) -> StepTimes:
    """The same by the trainer."""
    times = StepTimes(bare)
    world = World.current()
    Trainer(spec=spec, task=task, shards=shards, run_dir=run_dir, world=world, hooks=times).run()
    return times


def synchronous_saves(run_dir: Path, repeat: int) -> list[float]:
    """Seconds for which training would stand still if it waited for the whole save."""
    found = sorted((run_dir / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in saved_tensors(found[-1]).items()}
    load_tensors(tensors, found[-1])
    keep = CheckpointSpec(every_steps=1, keep_last=2, keep_best=0)
    checkpoints = Checkpoints(run_dir / "synchronous", keep, "min", World.current())
    checkpoints.root.mkdir()
    seconds = []
    for number in range(1, repeat + 1):
        meta = Meta(
            step=number,
            to_evaluate=False,
            defining={},
            num_workers=1,
            strategy="",
        )
        began = time.perf_counter()
        checkpoints.save(tensors, meta)
        checkpoints.wait()
        seconds.append(time.perf_counter() - began)
    checkpoints.close()
    return seconds


def bench_spec(arguments: argparse.Namespace) -> TrainSpec:
    """Steps without checkpoints in between."""
    return replace(
        TINY_SPEC,
        optimizer=Adam(kind="adamw", lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8),
        schedule=ScheduleSpec(kind="constant", warmup_steps=0, final_fraction=None, decay_steps=None),
        batch=BatchSpec(sequences=8, micro_sequences=4),
        duration=DurationSpec(kind="steps", amount=arguments.steps),
        checkpoint=CheckpointSpec(every_steps=10**9, keep_last=2, keep_best=0),
        deterministic=False,
    )


def main() -> None:
    """Measure in turns, print the table."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    task, shards = LlamaTask(arguments.hidden_size), RandomShards(256, arguments.sequence_tokens)
    spec = bench_spec(arguments)
    saving = replace(spec, checkpoint=CheckpointSpec(every_steps=arguments.steps // 4, keep_last=2, keep_best=0))
    bare: list[float] = []
    ours: list[float] = []
    waits: list[float] = []
    stalls: list[float] = []
    saves: list[float] = []
    for _ in range(arguments.repeat):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            times = trainer_steps(task, shards, spec, Path(folder) / "plain", BareLoop(task, shards, spec))
            bare += times.bare[2:-1]
            ours += times.ours[2:]
            waits += [report.data_wait_s / report.step_s for report in times.reports[2:-1]]
            reports = trainer_steps(task, shards, saving, Path(folder) / "saving").reports
            stalls += [report.checkpoint_stall_s for report in reports[:-1] if report.checkpoint_stall_s > 0]
            saves += synchronous_saves(Path(folder) / "saving", 3)
    Console(width=130).print(table(bare, ours, waits, stalls, saves))


def table(
    bare: Sequence[float],
    ours: Sequence[float],
    waits: Sequence[float],
    stalls: Sequence[float],
    saves: Sequence[float],
) -> Table:
    """Medians, and ratios against the goals."""
    found = Table(title="training loop: medians in this run", title_justify="left")
    for heading in ("what", "against", "ratio", "goal"):
        found.add_column(heading)
    middle = statistics.median
    rows = [
        ("step", middle(ours), "bare loop", middle(bare), GOALS["loop"]),
        ("checkpoint stall", middle(stalls), "synchronous save", middle(saves), GOALS["stall"]),
    ]
    for what, value_s, against, other_s, goal in rows:
        left, right = f"{what} {1000 * value_s:.1f} ms", f"{against} {1000 * other_s:.1f} ms"
        found.add_row(left, right, f"{value_s / other_s:.3f}", f"<= {goal}")
    found.add_row("data wait", "step", f"{middle(waits):.4f}", f"<= {GOALS['data wait']}")
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.bench training")
    parser.add_argument("--steps", type=int, default=40, help="steps of each run")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--sequence-tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: the temporary folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
