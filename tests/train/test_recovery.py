"""What survives: a killed worker, a changed number of workers, a changed strategy, a lost checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.tiny_task import EVALUATION, tiny_spec
from tests.support.train_workers import Case, Group, Seen, run_cases, run_groups
from train_jobs.trainer.spec import BatchSpec, Ddp, Fsdp, Hsdp, Pipeline, Single, StrategySpec
from train_jobs.trainer.state import load_tensors, saved_tensors

ONE_F_ONE_B = Pipeline(schedule="1f1b", data_parallel=1, stages_per_worker=1)


def everything(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, optimizer states, averages."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in saved_tensors(directory).items()}
    load_tensors(tensors, directory)
    return tensors


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = everything(one), everything(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def global_ids(attempt: list[Seen]) -> dict[int, list[int]]:
    """Sequence ids of every step over all workers of an attempt, sorted."""
    steps = sorted({step for worker in attempt for step in worker.sequence_ids})
    return {step: sorted(one for worker in attempt for one in worker.sequence_ids.get(step, [])) for step in steps}


def test_killed_worker_changes_no_bit(tmp_path: Path) -> None:
    strategies: dict[str, StrategySpec] = {"ddp": Ddp(), "fsdp": Fsdp(), "pipeline": ONE_F_ONE_B}
    specs = {name: tiny_spec(strategy=strategy, ema=0.9) for name, strategy in strategies.items()}
    calm = [Case(spec=spec, run_dir=tmp_path / "calm" / name, dropout=0.1) for name, spec in specs.items()]
    groups = [Group(num_workers=2, folder=tmp_path / "w-calm", cases=calm)]
    for name, spec in specs.items():
        case = Case(spec=spec, run_dir=tmp_path / "killed" / name, dropout=0.1, kill_at=13)
        groups.append(Group(num_workers=2, folder=tmp_path / f"w-killed-{name}", cases=[case]))
    [undisturbed, _], *attempts = run_groups(*groups)
    for survivor, killed in attempts:
        assert killed == []
        assert survivor[0].result is None
        assert survivor[0].error is not None
    again = [Case(spec=spec, run_dir=tmp_path / "killed" / name, dropout=0.1) for name, spec in specs.items()]
    resumed = run_cases(2, tmp_path / "w-again", again)[0]
    for one, other in zip(undisturbed, resumed, strict=True):
        assert one.result is not None
        assert other.result is not None, other.error
        assert other.result.resumed_from in (5, 10)
        assert other.losses == one.losses[other.result.resumed_from :]
        assert_same_bits(one.result.checkpoint, other.result.checkpoint)
        lines = [json.loads(line) for line in (other.case.run_dir / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 21))


def test_killed_worker_of_three_changes_no_bit(tmp_path: Path) -> None:
    """With three, the order of a sum matters, so gradients must be sent in the same pieces after a restart."""
    spec = tiny_spec(strategy=Ddp(), batch=BatchSpec(sequences=12, micro_sequences=4))
    calm = run_cases(3, tmp_path / "w-calm", [Case(spec=spec, run_dir=tmp_path / "calm")])[0][0]
    assert run_cases(3, tmp_path / "w-killed", [Case(spec=spec, run_dir=tmp_path / "run", kill_at=11)])[2] == []
    again = run_cases(3, tmp_path / "w-again", [Case(spec=spec, run_dir=tmp_path / "run")])[0][0]
    assert calm.result is not None
    assert again.result is not None, again.error
    assert again.result.resumed_from in (5, 10)  # the second may not have been committed yet
    assert_same_bits(calm.result.checkpoint, again.result.checkpoint)


def test_worker_that_cannot_write_ends_all_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    case = Case(spec=tiny_spec(strategy=Fsdp()), run_dir=tmp_path / "run", full_at=7)
    attempt = run_cases(2, tmp_path / "w-full", [case])
    for worker in attempt:
        assert worker[0].error is not None
        assert "step-10: the checkpoint could not be written" in worker[0].error
        assert "File too large" in worker[0].error
        assert worker[0].checkpoints == ["step-5"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-5"]
    again = run_cases(2, tmp_path / "w-again", [Case(spec=case.spec, run_dir=case.run_dir)])[0][0]
    assert again.result is not None, again.error
    assert (again.result.resumed_from, again.result.step) == (5, 20)


def test_two_then_one_then_two_workers(tmp_path: Path) -> None:
    spec = tiny_spec(strategy=Ddp())
    [[alone]] = run_cases(1, tmp_path / "w-alone", [Case(spec=tiny_spec(), run_dir=tmp_path / "alone")])
    attempts = [
        run_cases(size, tmp_path / f"w-{number}", [Case(spec=spec, run_dir=tmp_path / "run", stop_at=stop_at)])
        for number, (size, stop_at) in enumerate([(2, 6), (1, 12), (2, None)])
    ]
    seen = [[worker[0] for worker in attempt] for attempt in attempts]
    results = [attempt[0].result for attempt in seen]
    assert [(one.step, one.resumed_from, one.outcome) for one in results if one is not None] == [
        (7, None, "stopped"),
        (13, 7, "stopped"),
        (20, 13, "finished"),
    ]
    assert all(len(ids) == 16 for ids in global_ids([alone]).values())
    joined = global_ids(seen[0]) | global_ids(seen[1]) | global_ids(seen[2])
    assert joined == global_ids([alone])
    losses = seen[0][0].losses + seen[1][0].losses + seen[2][0].losses
    assert losses == pytest.approx(alone.losses, rel=1e-5, abs=0)


def test_strategy_may_change_on_the_way(tmp_path: Path) -> None:
    [[alone]] = run_cases(
        1, tmp_path / "w-alone", [Case(spec=tiny_spec(evaluation=EVALUATION, ema=0.8), run_dir=tmp_path / "alone")]
    )
    strategies: list[StrategySpec] = [Fsdp(), ONE_F_ONE_B, Hsdp(shard_workers=1), Ddp()]
    cases = [
        Case(
            spec=tiny_spec(strategy=strategy, evaluation=EVALUATION, ema=0.8),
            run_dir=tmp_path / "run",
            stop_at=4 * number + 3,
        )
        for number, strategy in enumerate(strategies)
    ]
    first = run_cases(2, tmp_path / "w-two", cases)[0]
    last = Case(spec=tiny_spec(strategy=Single(), evaluation=EVALUATION, ema=0.8), run_dir=tmp_path / "run")
    [[end]] = run_cases(1, tmp_path / "w-one", [last])
    assert [one.error for one in first] == [None] * 4
    losses = [loss for one in (*first, end) for loss in one.losses]
    assert losses == pytest.approx(alone.losses, rel=1e-5, abs=0)
    assert end.result is not None
    assert alone.result is not None
    assert end.result.metrics == pytest.approx(alone.result.metrics, rel=1e-5)
    assert everything(end.result.checkpoint).keys() == everything(alone.result.checkpoint).keys()
