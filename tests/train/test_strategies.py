"""Every strategy at two workers trains as one process does: the same losses, step by step, in float32."""

import pytest

from tests.support.tiny_task import tiny_spec
from tests.support.train_workers import Case, Group, run_groups
from train_jobs.trainer.spec import CheckpointSpec, Ddp, DurationSpec, Fsdp, Hsdp, Pipeline, Single, StrategySpec

STRATEGIES: dict[str, StrategySpec] = {
    "ddp": Ddp(),
    "fsdp": Fsdp(),
    "hsdp-1": Hsdp(shard_workers=1),
    "hsdp-2": Hsdp(shard_workers=2),
    "1f1b": Pipeline(schedule="1f1b", data_parallel=1, stages_per_worker=1),
    "interleaved": Pipeline(schedule="interleaved", data_parallel=1, stages_per_worker=2),
}
STEPS = 50
LIMITS = {"ddp": 1e-6}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """By strategy; all strategies at two workers run in one pair of processes."""
    folder = tmp_path_factory.mktemp("strategies")
    duration = DurationSpec(kind="steps", amount=STEPS)
    at_the_end = CheckpointSpec(every_steps=1000, keep_last=1, keep_best=0)

    def case(name: str, strategy: StrategySpec) -> Case:
        return Case(
            spec=tiny_spec(strategy=strategy, duration=duration, checkpoint=at_the_end), run_dir=folder / name
        )

    cases = [case(name, strategy) for name, strategy in STRATEGIES.items()]
    [[alone]], together = run_groups(
        Group(num_workers=1, folder=folder / "one", cases=[case("single", Single())]),
        Group(num_workers=2, folder=folder / "two", cases=cases),
    )
    assert [one.error for worker in together for one in worker] == [None] * (2 * len(STRATEGIES))
    return {"single": alone.losses} | {name: one.losses for name, one in zip(STRATEGIES, together[0], strict=True)}


@pytest.mark.parametrize("name", STRATEGIES)
def test_losses_equal_those_of_one_process(losses: dict[str, list[float]], name: str) -> None:
    assert len(losses[name]) == STEPS
    assert losses["single"][-1] < 0.8 * losses["single"][0]
    assert losses[name] == pytest.approx(losses["single"], rel=LIMITS.get(name, 1e-5), abs=0)
