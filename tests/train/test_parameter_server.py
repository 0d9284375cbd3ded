"""The parameter server in real processes: with bound 0 as one process computes, else each batch counts once."""

import functools
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_task import EVALUATION, tiny_spec
from tests.support.tiny_tasks import LORA, open_task, save_base, task_spec, write_task_data
from tests.support.train_workers import Case, Group, Seen, run_cases, run_groups
from train_jobs.trainer.committed import committed_steps
from train_jobs.trainer.spec import (
    Adam,
    BatchSpec,
    CheckpointSpec,
    Ddp,
    DurationSpec,
    EvaluationSpec,
    Muon,
    ParameterServer,
    Single,
    StrategySpec,
)
from train_jobs.trainer.state import load_tensors, saved_tensors

FIFTY = DurationSpec(kind="steps", amount=50)
IN_TURN = ParameterServer(max_staleness=0)
LOW_BIT = Adam(kind="adamw8bit", lr=3e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
MUON = Muon(lr=3e-3, weight_decay=0.01, momentum=0.95, nesterov=True, betas=(0.9, 0.999), eps=1e-8)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"duration": FIFTY},
    "averaged": {"ema": 0.9, "evaluation": EVALUATION},
    "bfloat16": {"precision": "bfloat16"} | ({"optimizer": LOW_BIT} if find_spec("torchao") else {}),
    "muon": {"optimizer": MUON, "activation_checkpointing": True},
}
TASKS = {"sft-lora": ("sft", LORA), "dpo": ("dpo", None)}


def everything(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in saved_tensors(directory).items()}
    load_tensors(tensors, directory)
    return tensors


def cases(folder: Path, strategy: StrategySpec) -> dict[str, Case]:
    found = {
        name: Case(spec=tiny_spec(strategy=strategy, **changes), run_dir=folder / name, dropout=0.1)
        for name, changes in SETTINGS.items()
    }
    for name, (task, adapter) in TASKS.items():
        data = folder / f"data-{task}"
        write_task_data(data, task)
        setup = functools.partial(
            open_task, task_spec(task, save_base(folder / f"base-{task}"), adapter=adapter), data
        )
        spec = tiny_spec(
            strategy=strategy,
            batch=BatchSpec(sequences=8, micro_sequences=2),
            evaluation=EvaluationSpec(every_steps=None, metric="loss", mode="min"),
        )
        found[name] = Case(spec=spec, run_dir=folder / name, setup=setup)
    return found


def test_bound_0_is_one_process_bit_for_bit(tmp_path: Path) -> None:
    alone, served = cases(tmp_path / "1", Single()), cases(tmp_path / "2", IN_TURN)
    [expected], [server, computing] = run_groups(
        Group(num_workers=1, folder=tmp_path / "w-1", cases=list(alone.values())),
        Group(num_workers=2, folder=tmp_path / "w-2", cases=list(served.values())),
    )
    for name, one, other, worker in zip(alone, expected, server, computing, strict=True):
        assert other.error is None, name
        assert (other.losses, other.norms, other.checkpoints) == (one.losses, one.norms, one.checkpoints), name
        assert one.result is not None
        assert other.result is not None
        assert worker.result == other.result
        assert other.result.metrics == one.result.metrics
        first, second = everything(one.result.checkpoint), everything(other.result.checkpoint)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], name
        assert worker.sequence_ids == one.sequence_ids


def ids(seen: list[Seen]) -> dict[int, list[int]]:
    """Sequence ids of every batch, over workers and attempts."""
    found: dict[int, list[int]] = {}
    for one in seen:
        for step, some in one.sequence_ids.items():
            found.setdefault(step, []).extend(some)
    return dict(sorted(found.items()))


def staleness(run_dir: Path) -> list[int]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["staleness"] for line in lines]


def test_every_batch_counts_once_and_the_loss_falls(tmp_path: Path) -> None:
    """At three workers, two of which compute; stopped in the middle, and continued by one process in the end."""
    [[alone]] = run_cases(1, tmp_path / "w-1", [Case(spec=tiny_spec(duration=FIFTY), run_dir=tmp_path / "alone")])
    bounds = {"bound-1": 1, "no-bound": None}
    specs = {
        name: tiny_spec(duration=FIFTY, strategy=ParameterServer(max_staleness=bound))
        for name, bound in bounds.items()
    }
    chosen = [
        Case(spec=spec, run_dir=tmp_path / name, stop_at=stop_at)
        for name, spec in specs.items()
        for stop_at in (17, 33, None)
    ]
    attempts = list(zip(*run_cases(3, tmp_path / "w-3", chosen), strict=True))
    for number, name in enumerate(bounds):
        three = attempts[3 * number : 3 * number + 3]
        assert [worker.error for attempt in three for worker in attempt] == [None] * 9
        assert [worker.result for attempt in three for worker in attempt] == [
            attempt[0].result for attempt in three for _ in range(3)
        ]
        results = [attempt[0].result for attempt in three]
        assert [one.outcome for one in results if one is not None] == ["stopped", "stopped", "finished"]
        assert [one.resumed_from for one in results if one is not None] == [
            None,
            *(one.step for one in results[:2] if one is not None),
        ]
        assert ids([worker for attempt in three for worker in attempt]) == ids([alone])
        losses = [loss for attempt in three for loss in attempt[0].losses]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
        found = staleness(tmp_path / name)
        assert len(found) == 50
        bound = bounds[name]
        assert bound is None or max(found) <= bound


def test_a_lost_worker_costs_no_batch(tmp_path: Path) -> None:
    spec = tiny_spec(strategy=ParameterServer(max_staleness=None))
    server, _, killed = run_cases(3, tmp_path / "w-3", [Case(spec=spec, run_dir=tmp_path / "run", kill_at=13)])
    assert killed == []
    assert server[0].result is None
    assert "worker 2 is lost" in str(server[0].error)
    done = committed_steps(tmp_path / "run" / "checkpoints")[-1]
    assert done in (5, 10)
    last = replace(spec, strategy=Ddp())
    resumed = run_cases(2, tmp_path / "w-2", [Case(spec=last, run_dir=tmp_path / "run")])
    result = resumed[0][0].result
    assert result is not None
    assert (result.resumed_from, result.step) == (done, 20)
    assert list(ids([worker[0] for worker in resumed])) == list(range(done, 20))


def test_what_ends_the_server_ends_all(tmp_path: Path) -> None:
    checkpoint = CheckpointSpec(every_steps=5, keep_last=2, keep_best=0)
    wrong = EvaluationSpec(every_steps=10, metric="f1", mode="max")
    spec = tiny_spec(strategy=ParameterServer(max_staleness=2), checkpoint=checkpoint, evaluation=wrong)
    for worker in run_cases(3, tmp_path / "w-3", [Case(spec=spec, run_dir=tmp_path / "run")]):
        assert worker[0].result is None
        assert "the evaluation gives no f1; it gives loss" in str(worker[0].error)
