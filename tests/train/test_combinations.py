"""Settings that touch the weights, together with strategies that cut them: as one process does, step by step."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_task import EVALUATION, tiny_spec
from tests.support.train_workers import Case, Group, run_groups
from train_jobs.trainer.spec import Ddp, DurationSpec, Fsdp, Hsdp, Muon, Pipeline, Single, StrategySpec

TEN_STEPS = DurationSpec(kind="steps", amount=10)
MUON = Muon(lr=3e-3, weight_decay=0.01, momentum=0.95, nesterov=True, betas=(0.9, 0.999), eps=1e-8)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "muon": {"optimizer": MUON},
    "bfloat16": {"precision": "bfloat16"},
    "recomputed": {"activation_checkpointing": True},
    "averaged": {"ema": 0.9, "evaluation": EVALUATION},
}
ONE_F_ONE_B = Pipeline(schedule="1f1b", data_parallel=1, stages_per_worker=1)
AT_TWO: list[tuple[str, StrategySpec, float]] = [
    ("muon", Fsdp(), 1e-4),  # torch orthogonalizes in bfloat16
    ("muon", ONE_F_ONE_B, 1e-4),
    ("bfloat16", Ddp(), 1e-3),
    ("bfloat16", Fsdp(), 2e-2),
    ("bfloat16", ONE_F_ONE_B, 1e-3),
    ("recomputed", Fsdp(), 1e-5),
    ("recomputed", ONE_F_ONE_B, 1e-5),
    ("averaged", Fsdp(), 1e-5),
    ("averaged", ONE_F_ONE_B, 1e-5),
]
AT_FOUR: list[tuple[str, StrategySpec, float]] = [
    ("plain", Hsdp(shard_workers=2), 1e-5),
    ("plain", Pipeline(schedule="1f1b", data_parallel=2, stages_per_worker=1), 1e-5),
]
DROPOUT = [Ddp(), Fsdp()]


def case(folder: Path, setting: str, strategy: StrategySpec, dropout: float = 0.0) -> Case:
    spec = tiny_spec(strategy=strategy, duration=TEN_STEPS, **SETTINGS[setting])
    return Case(spec=spec, run_dir=folder / f"{setting}-{strategy}-{dropout}", dropout=dropout)


def test_settings_and_strategies_go_together(tmp_path: Path) -> None:
    single = [case(tmp_path / "1", name, Single()) for name in SETTINGS]
    groups = [Group(num_workers=1, folder=tmp_path / "w-1", cases=single)]
    for size, chosen in ((2, AT_TWO), (4, AT_FOUR)):
        cases = [case(tmp_path / str(size), name, strategy) for name, strategy, _ in chosen]
        groups.append(Group(num_workers=size, folder=tmp_path / f"w-{size}", cases=cases))
    [alone], at_two, at_four = run_groups(*groups)
    expected = dict(zip(SETTINGS, alone, strict=True))
    for found, chosen in ((at_two, AT_TWO), (at_four, AT_FOUR)):
        for (name, strategy, limit), seen in zip(chosen, found[0], strict=True):
            assert seen.error is None, (name, strategy)
            assert seen.losses == pytest.approx(expected[name].losses, rel=limit, abs=0), (name, strategy)
            assert seen.norms == pytest.approx(expected[name].norms, rel=20 * limit, abs=0), (name, strategy)
            assert seen.result is not None
            assert expected[name].result is not None
            assert seen.result.metrics == pytest.approx(expected[name].result.metrics, rel=limit), (name, strategy)


def test_dropout_is_the_same_at_every_number_of_workers(tmp_path: Path) -> None:
    single = [case(tmp_path / "1", "plain", Single(), dropout=0.2)]
    cases = [case(tmp_path / "2", "plain", strategy, dropout=0.2) for strategy in DROPOUT]
    [[alone]], together = run_groups(
        Group(num_workers=1, folder=tmp_path / "w-1", cases=single),
        Group(num_workers=2, folder=tmp_path / "w-2", cases=cases),
    )
    for seen in together[0]:
        assert seen.error is None
        assert seen.losses == pytest.approx(alone.losses, rel=1e-5, abs=0)
