"""Sweeps without Ray: which values are tried, which trial is the best, evaluations read as they are logged."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from cluster.errors import DataError, PlanError
from cluster.runs.log import EvaluationReport
from cluster.runs.sweep import Sweep, Trial, ranked, read_sweep, write_sweep
from tests.support.tiny_task import tiny_spec
from train_jobs.job import SpaceSpec, TuneSpec
from train_jobs.trainer.errors import TrainingError
from train_jobs.trainer.spec import CheckpointSpec, EvaluationSpec
from train_jobs.tuning.log_tail import LogTail
from train_jobs.tuning.points import planned_points
from train_jobs.tuning.scores import Score
from train_jobs.tuning.tpe import make_searcher, read_point
from train_jobs.tuning.trials import Table, choose_best
from train_jobs.views.sweep import sweep_view, value_text


def tune_spec(**changes: Any) -> TuneSpec:
    values: dict[str, Any] = {
        "name": "sweep",
        "job": "newsroom",
        "search": "random",
        "trials": 6,
        "space": {"optimizer.lr": SpaceSpec(kind="log_uniform", values=[1e-5, 1e-2])},
        "metric": "accuracy",
        "mode": "max",
        "stop": None,
        "concurrent": 1,
        "seed": 3,
    }
    return TuneSpec(**values | changes)


CHOICES = {
    "optimizer.lr": SpaceSpec(kind="choice", values=[1e-4, 1e-3]),
    "schedule": SpaceSpec(kind="choice", values=[{"kind": "linear"}, {"kind": "cosine"}, None]),
}


def test_a_grid_has_every_combination_in_the_order_of_the_file() -> None:
    points = planned_points(tune_spec(search="grid", trials=None, space=CHOICES))
    assert points == [
        {"optimizer.lr": rate, "schedule": schedule}
        for rate in (1e-4, 1e-3)
        for schedule in ({"kind": "linear"}, {"kind": "cosine"}, None)
    ]


def test_a_grid_over_a_range_is_refused() -> None:
    with pytest.raises(PlanError, match=r"space.optimizer.lr: log_uniform has no values to try one by one"):
        planned_points(tune_spec(search="grid", trials=None))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), trials=st.integers(1, 30))
def test_random_points_are_in_range_distinct_and_the_same_again(seed: int, trials: int) -> None:
    space = {
        "optimizer.lr": SpaceSpec(kind="log_uniform", values=[1e-5, 1e-2]),
        "clip_norm": SpaceSpec(kind="uniform", values=[0.12345, 0.54321]),
        "seed": SpaceSpec(kind="integer", values=[1, 3]),
    }
    spec = tune_spec(seed=seed, trials=trials, space=space)
    points = planned_points(spec)
    assert points is not None
    assert len({json.dumps(point) for point in points}) == trials
    for point in points:
        assert 1e-5 <= point["optimizer.lr"] <= 1e-2
        assert 0.12345 <= point["clip_norm"] <= 0.54321
        assert point["seed"] in (1, 2, 3)
    assert planned_points(spec) == points


def test_more_trials_begin_with_the_same_ones() -> None:
    few, many = planned_points(tune_spec(trials=4)), planned_points(tune_spec(trials=12))
    assert few is not None
    assert many is not None
    assert many[:4] == few


def test_log_uniform_draws_orders_of_magnitude_alike() -> None:
    points = planned_points(tune_spec(trials=300))
    assert points is not None
    below = sum(math.log10(point["optimizer.lr"]) < -3.5 for point in points)
    assert 110 < below < 190


def test_more_trials_than_points_are_refused() -> None:
    with pytest.raises(PlanError, match="trials: 8, but the space has about 6 points; set trials to 6"):
        planned_points(tune_spec(trials=8, space=CHOICES))


def test_tpe_suggests_values_of_the_space_and_moves_to_where_good_ones_were() -> None:
    spec = tune_spec(search="tpe", space=CHOICES | {"clip_norm": SpaceSpec(kind="uniform", values=[0.0, 1.0])})
    assert planned_points(spec) is None
    searcher = make_searcher(spec)
    tried = []
    for number in range(40):
        point = read_point(spec, searcher.suggest(str(number)))
        assert point["optimizer.lr"] in (1e-4, 1e-3)
        assert point["schedule"] in ({"kind": "linear"}, {"kind": "cosine"}, None)
        searcher.on_trial_complete(str(number), {"accuracy": 1 - abs(point["clip_norm"] - 0.8)})
        tried.append(abs(point["clip_norm"] - 0.8))
    assert sum(tried[-20:]) / 20 < 0.8 * sum(tried[:10]) / 10, "the first ten are drawn anywhere"


def trial(number: int, score: float | None, status: Any = "finished", **values: Any) -> Trial:
    return Trial(number=number, values={"seed": number}, status=status, score=score, **values)


def test_the_best_trial_is_a_finished_one_and_of_equal_ones_the_first() -> None:
    trials = [trial(1, 0.5), trial(2, 0.9, "ended early"), trial(3, 0.8), trial(4, 0.8), trial(5, None, "failed")]
    assert choose_best(trials, "max").number == 3
    assert choose_best(trials, "min").number == 1


def test_a_sweep_of_which_nothing_finished_says_why() -> None:
    trials = [trial(1, 0.5, "ended early"), trial(2, None, "failed", error="the loss is nan")]
    with pytest.raises(TrainingError, match="none of 2 trials has finished with a score; trial 2: the loss is nan"):
        choose_best(trials, "max")


def test_a_table_follows_its_trials() -> None:
    seen: list[Sweep] = []
    sweep = Sweep(job="sweep", varied="newsroom", search="random", metric="accuracy", mode="max")
    times = iter(range(100))
    table = Table(sweep, seen.append, clock=lambda: float(next(times)))
    for key, value in (("a", 1), ("b", 2), ("c", 3)):
        table.begin(key, {"seed": value})
    table.evaluated("b", run_id="run-b", step=10, score=0.7)
    table.end("b", "finished")
    table.end("a", "failed", "the loss is nan")
    table.evaluated("c", run_id="run-c", step=10, score=0.6)
    table.end("c", "ended early")
    assert table.close().number == 2
    table.published("newsroom@v1")
    assert table.sweep == seen[-1]
    assert (table.sweep.best, table.sweep.published) == (2, "newsroom@v1")
    assert [(one.number, one.status, one.score) for one in ranked(table.sweep)] == [
        (2, "finished", 0.7),
        (3, "ended early", 0.6),
        (1, "failed", None),
    ]


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    sweep = Sweep(job="s", varied="j", search="grid", metric="loss", mode="min", best=1, trials=(trial(1, 0.5),))
    assert read_sweep(tmp_path) is None
    write_sweep(tmp_path, sweep)
    assert read_sweep(tmp_path) == sweep
    (tmp_path / "tune.json").write_text("{}")
    with pytest.raises(DataError, match="is not a sweep this Manta can read"):
        read_sweep(tmp_path)


def evaluation_line(step: int) -> str:
    return json.dumps({"step": step, "evaluation": {"accuracy": step / 100}, "time": 1.0}) + "\n"


def line(step: int, **metrics: float) -> EvaluationReport:
    return EvaluationReport(step=step, evaluation=metrics, time=0.0)


LINES = [line(5, accuracy=0.5, loss=1.0), line(10, accuracy=0.9, loss=0.5), line(15, accuracy=0.95, loss=0.7)]


def test_a_trial_is_worth_what_its_run_would_publish() -> None:
    evaluation = EvaluationSpec(every_steps=5, metric="loss", mode="min")
    best_kept = tiny_spec(evaluation=evaluation, checkpoint=CheckpointSpec(every_steps=5, keep_last=1, keep_best=1))
    score = Score("accuracy", best_kept)
    assert [score.after(each) for each in LINES] == [0.5, 0.9, 0.9]
    last_kept = tiny_spec(evaluation=evaluation, checkpoint=CheckpointSpec(every_steps=5, keep_last=1, keep_best=0))
    score = Score("accuracy", last_kept)
    assert [score.after(each) for each in LINES] == [0.5, 0.9, 0.95]
    with pytest.raises(TrainingError, match="the evaluation gives no macro_f1; it gives accuracy, loss"):
        Score("macro_f1", last_kept).after(LINES[0])


def test_evaluations_come_once_and_whole(tmp_path: Path) -> None:
    log = tmp_path / "evaluations.jsonl"
    tail = LogTail(tmp_path)
    assert tail.new() == []
    log.write_text(evaluation_line(10) + evaluation_line(20)[:15])
    assert [line.step for line in tail.new()] == [10]
    log.write_text(evaluation_line(10) + evaluation_line(20))
    assert [(line.step, line.evaluation) for line in tail.new()] == [(20, {"accuracy": 0.2})]
    assert tail.new() == []


def test_a_run_that_went_back_to_a_checkpoint_does_not_repeat_its_evaluations(tmp_path: Path) -> None:
    log, newer = tmp_path / "evaluations.jsonl", tmp_path / "newer"
    log.write_text(evaluation_line(10) + evaluation_line(20))
    tail = LogTail(tmp_path)
    assert [line.step for line in tail.new()] == [10, 20]
    newer.write_text(evaluation_line(10))
    newer.replace(log)
    assert tail.new() == []
    log.write_text(evaluation_line(10) + evaluation_line(20) + evaluation_line(30))
    assert [line.step for line in tail.new()] == [30]


def test_the_table_for_people_has_the_best_trial_first_and_says_why_others_failed() -> None:
    trials = (
        trial(1, 0.5, step=40),
        trial(2, None, "failed", error="step 3: the loss is nan"),
        trial(3, 0.75, step=40),
        trial(4, 0.25, "ended early", step=10),
    )
    sweep = Sweep(
        job="sweep", varied="newsroom", search="random", metric="accuracy", mode="max", best=3, trials=trials
    )
    text = printed(sweep_view(sweep))
    lines = [line.split() for line in text.splitlines()]
    assert ["3", "3", "0.7500", "40", "0", "best"] in lines
    order = [line[0] for line in lines if line and line[0].isdigit()]
    assert order == ["3", "1", "4", "2"]
    assert "Trial 2: step 3: the loss is nan" in text
    assert max(map(len, text.splitlines())) <= 80
    assert value_text({"kind": "linear", "warmup_steps": 10}) == "kind linear, warmup_steps 10"


def printed(view: RenderableType) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(view)
    return console.export_text()
