"""Every task under every strategy that it may be combined with trains as one process does, in float32."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config.jobs_train import JobTask
from cluster.errors import PlanError
from tests.support.tiny_task import tiny_spec
from tests.support.tiny_tasks import LORA, open_task, save_base, task_spec, write_task_data
from tests.support.train_workers import Case, Group, Seen, run_groups
from train_jobs.tasks.combinations import check_combination
from train_jobs.trainer.spec import (
    BatchSpec,
    CheckpointSpec,
    Ddp,
    DurationSpec,
    EvaluationSpec,
    Fsdp,
    Pipeline,
    Single,
    StrategySpec,
)

STEPS = 12
STRATEGIES: dict[str, StrategySpec] = {
    "ddp": Ddp(),
    "fsdp": Fsdp(),
    "1f1b": Pipeline(schedule="1f1b", data_parallel=1, stages_per_worker=1),
    "interleaved": Pipeline(schedule="interleaved", data_parallel=1, stages_per_worker=2),
}
TASKS: dict[str, tuple[JobTask, str | None]] = {
    "lm": ("lm", None),
    "sft-lora": ("sft", "lora"),
    "sft-dora": ("sft", "dora"),
    "classify": ("classify", None),
    "classify-lora": ("classify", "lora"),
    "dpo": ("dpo", None),
    "dpo-lora": ("dpo", "lora"),
}


def allowed(task: JobTask, strategy: StrategySpec) -> bool:
    try:
        check_combination(task, strategy.kind, None)
    except PlanError:
        return False
    return True


PAIRS = [
    (name, strategy)
    for name, (task, _) in TASKS.items()
    for strategy in STRATEGIES
    if allowed(task, STRATEGIES[strategy])
]


def cases(folder: Path, pairs: list[tuple[str, StrategySpec]]) -> list[Case]:
    bases = {
        "classify": save_base(folder / "bert", "bert"),
        "dpo": save_base(folder / "dpo"),
        "sft": save_base(folder / "tied"),
        "lm": save_base(folder / "llama", tie_word_embeddings=False),
    }
    for task in bases:
        write_task_data(folder / f"data-{task}", task)
    found = []
    for name, strategy in pairs:
        task, kind = TASKS[name]
        adapter = None if kind is None else replace(LORA, kind=kind)
        train = tiny_spec(
            strategy=strategy,
            batch=BatchSpec(sequences=8, micro_sequences=2),
            duration=DurationSpec(kind="steps", amount=STEPS),
            checkpoint=CheckpointSpec(every_steps=1000, keep_last=1, keep_best=0),
            evaluation=EvaluationSpec(every_steps=None, metric="loss", mode="min"),
        )
        spec, data = task_spec(task, bases[task], adapter=adapter), folder / f"data-{task}"
        setup = functools.partial(open_task, spec, data, rows_at_once=4096 if strategy.kind == "single" else 4)
        found.append(Case(spec=train, run_dir=folder / f"{name}-{strategy.kind}-{len(found)}", setup=setup))
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Seen]:
    """By task and strategy; all at two workers run in one pair of processes."""
    folder = tmp_path_factory.mktemp("tasks")
    single = cases(folder / "1", [(name, Single()) for name in TASKS])
    chosen = cases(folder / "2", [(name, STRATEGIES[strategy]) for name, strategy in PAIRS])
    [alone], together = run_groups(
        Group(num_workers=1, folder=folder / "one", cases=single),
        Group(num_workers=2, folder=folder / "two", cases=chosen),
    )
    found = {(name, "single"): one for name, one in zip(TASKS, alone, strict=True)}
    for pair, first, second in zip(PAIRS, *together, strict=True):
        assert first.losses == second.losses
        found[pair] = first
    return found


@pytest.mark.parametrize(("name", "strategy"), PAIRS)
def test_losses_and_metrics_equal_those_of_one_process(
    seen: dict[tuple[str, str], Seen], name: str, strategy: str
) -> None:
    alone, other = seen[name, "single"], seen[name, strategy]
    assert other.error is None
    assert len(alone.losses) == STEPS
    assert other.losses == pytest.approx(alone.losses, rel=1e-5, abs=0)
    assert alone.result is not None
    assert other.result is not None
    assert other.result.metrics["loss"] == pytest.approx(alone.result.metrics["loss"], rel=1e-5)
    assert other.result.metrics.keys() == alone.result.metrics.keys()


@pytest.mark.parametrize("name", TASKS)
def test_loss_falls(seen: dict[tuple[str, str], Seen], name: str) -> None:
    losses = seen[name, "single"].losses
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
