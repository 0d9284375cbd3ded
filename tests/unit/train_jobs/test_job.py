"""Every kind of job in the YAML becomes the spec that its program reads."""

import re

import pytest

from cluster.config.load import load_text
from cluster.config.schema import ClusterConfig
from cluster.errors import PlanError
from cluster.plan.jobs import plan_job, plan_jobs, plan_trial
from train_jobs.job import (
    HarnessSpec,
    JobSpec,
    SpaceSpec,
    read_evaluate,
    read_job,
    read_prepare,
    read_tune,
    run_digest,
    run_directory,
)
from train_jobs.trainer.spec import (
    Adam,
    Ddp,
    Hsdp,
    Muon,
    ParameterServer,
    Pipeline,
    RmsProp,
    ScheduleSpec,
    Sgd,
    Single,
)

TEXT = """\
name: jobs
cluster: {nodes: [{name: box, resources: {CPU: 8}}]}
jobs:
  - name: news
    kind: prepare
    task: TASK
    inputs: [{source: "path:///rows", format: jsonl, weight: 2}]
    tokenizer: registry://minilm@latest
    sequence_tokens: 256
    split: {eval_fraction: 0.2}
  - name: newsroom
    kind: train
    task: TASK
    base: {source: registry://minilm@latest}
    data: news
    batch: {sequences: 32, micro_sequences: 8}
    duration: {epochs: 3}
    optimizer: {kind: adamw, lr: 5e-5}
    MORE
  - {name: sweep, kind: tune, job: newsroom, trials: 8, space: {"optimizer.lr": {log_uniform: [1e-5, 1e-3]}}}
  - {name: check, kind: evaluate, model: registry://newsroom@latest, data: news}
"""


def config_of(task: str = "classify", more: str = "") -> ClusterConfig:
    return load_text(TEXT.replace("TASK", task).replace("MORE", more), "f.yaml")


def job_of(task: str = "classify", more: str = "", digest: str = "d") -> JobSpec:
    return read_job(plan_job(config_of(task, more), "newsroom"), digest)


@pytest.mark.parametrize("task", ["lm", "sft", "classify", "dpo"])
def test_every_kind_of_job_is_read(task: str) -> None:
    prepare, train, tune, evaluate = plan_jobs(config_of(task))
    assert [plan.kind for plan in (prepare, train, tune, evaluate)] == ["prepare", "train", "tune", "evaluate"]
    data = read_prepare(prepare)
    assert (data.name, data.task, data.sequence_tokens) == ("news", task, 256)
    assert (data.inputs[0].source, data.inputs[0].weight, data.inputs[0].fields.text) == ("path:///rows", 2.0, "text")
    job = read_job(train)
    assert (job.name, job.task, job.base.source, job.data) == ("newsroom", task, "registry://minilm@latest", "news")
    assert (job.dpo is not None) == (task == "dpo")
    sweep = read_tune(tune)
    assert sweep.space == {"optimizer.lr": SpaceSpec(kind="log_uniform", values=[1e-5, 1e-3])}
    assert (sweep.job, sweep.metric, sweep.mode, sweep.stop) == ("newsroom", "loss", "min", None)
    measured = read_evaluate(evaluate)
    assert (measured.model, measured.task, measured.split) == ("registry://newsroom@latest", task, "eval")


def test_an_evaluation_by_tasks_reads_no_data() -> None:
    asked = "harness: {tasks: [arc_easy, mine], include: /tasks, limit: 9}"
    plan = plan_job(
        load_text(
            TEXT.replace("TASK", "lm").replace("MORE", "").replace("@latest, data: news}", f"@latest, {asked}}}"), "f"
        ),
        "check",
    )
    assert (plan.task, plan.data) == ("lm", None)
    spec = read_evaluate(plan)
    assert (spec.data, spec.split, spec.batch_sequences) == (None, None, 8)
    assert spec.harness == HarnessSpec(
        tasks=["arc_easy", "mine"], include="/tasks", num_fewshot=None, limit=9, chat_template=False
    )


def test_what_the_trainer_is_told() -> None:
    training = job_of(more="evaluate: {every_steps: 50, metric: macro_f1}", digest="abc").training
    assert training.optimizer == Adam(kind="adamw", lr=5e-5, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
    assert training.schedule == ScheduleSpec(kind="linear", warmup_steps=0, final_fraction=0.0, decay_steps=None)
    assert training.strategy == Ddp()
    assert (training.duration.kind, training.duration.amount) == ("epochs", 3)
    assert training.evaluation is not None
    assert (training.evaluation.metric, training.evaluation.mode) == ("macro_f1", "max")
    assert training.checkpoint.keep_best == 1
    assert training.data_digest == "abc"


def test_the_best_checkpoint_is_kept_where_there_are_several_evaluations() -> None:
    assert job_of().training.checkpoint.keep_best == 0
    unmeasured = TEXT[: TEXT.index("  - {name: sweep")].replace("TASK", "lm").replace("MORE", "evaluate: null")
    training = read_job(plan_job(load_text(unmeasured, "f"), "newsroom")).training
    assert (training.evaluation, training.checkpoint.keep_best) == (None, 0)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("{kind: single}", Single),
        ("{kind: hsdp, shard_workers: 1}", Hsdp),
        ("{kind: pipeline}\n    workers: 2", Pipeline),
        ("{kind: parameter_server}\n    workers: 2", ParameterServer),
    ],
)
def test_every_strategy_is_read(strategy: str, kind: type) -> None:
    assert isinstance(job_of("lm", f"strategy: {strategy}").training.strategy, kind)


@pytest.mark.parametrize(("written", "bound"), [("", 4), (", max_staleness: 0", 0), (", max_staleness: null", None)])
def test_a_parameter_server_has_a_bound_or_none(written: str, bound: int | None) -> None:
    job = job_of("classify", f"strategy: {{kind: parameter_server{written}}}\n    workers: 3")
    assert job.training.strategy == ParameterServer(max_staleness=bound)


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        ("kind: sgd, momentum: 0.9, nesterov: true", Sgd),
        ("kind: rmsprop", RmsProp),
        ("kind: adam", Adam),
        ("kind: adamw8bit", Adam),
        ("kind: muon", Muon),
    ],
)
def test_every_optimizer_is_read(optimizer: str, kind: type) -> None:
    text = TEXT.replace("TASK", "lm").replace("MORE", "").replace("kind: adamw", optimizer)
    assert isinstance(read_job(plan_job(load_text(text, "f"), "newsroom")).training.optimizer, kind)


def test_adapter_publication_and_limits() -> None:
    job = job_of(
        "sft",
        "adapter: {kind: dora, targets: [q_proj], publish: adapter}\n"
        "    publish: {model: chat, require: {loss: 2}}\n"
        "    workers: {min: 1, max: 2, resize_delay: 5s}\n"
        "    timeouts: {step: 1m}",
    )
    assert job.adapter is not None
    assert (job.adapter.kind, job.adapter.targets, job.adapter.publish) == ("dora", ("q_proj",), "adapter")
    assert job.publish is not None
    assert (job.publish.model, job.publish.alias, job.publish.require) == ("chat", "latest", {"loss": 2.0})
    assert (job.workers.min, job.workers.max, job.workers.resize_delay_s) == (1, 2, 5.0)
    assert (job.timeouts.start_s, job.timeouts.step_s) == (600.0, 60.0)


def test_equal_results_are_one_run() -> None:
    job = job_of()
    same = job_of(more="workers: 2\n    strategy: {kind: fsdp}\n    publish: {model: other}\n    max_failures: 9")
    directory = run_directory("/shelf", job, "minilm@v1")
    assert directory == run_directory("file:///shelf", same, "minilm@v1")
    assert re.fullmatch(r"/shelf/runs/newsroom/newsroom-[0-9a-f]{12}", str(directory))
    others = [
        run_digest(job, "minilm@v2"),
        run_digest(job_of(digest="other"), "minilm@v1"),
        run_digest(job_of(more="seed: 1"), "minilm@v1"),
        run_digest(job_of(more="adapter: {rank: 4}"), "minilm@v1"),
    ]
    assert len({run_digest(job, "minilm@v1"), *others}) == 5


def test_a_run_has_no_name_before_its_data_have() -> None:
    with pytest.raises(PlanError, match=r"jobs.newsroom: data news are not prepared yet; run news first"):
        run_directory("/shelf", read_job(plan_job(config_of(), "newsroom")), "minilm@v1")


def test_a_trial_is_the_job_with_other_values() -> None:
    trial = read_job(plan_trial(config_of(), "newsroom", {"optimizer.lr": 0.5, "adapter": {"rank": 4}}))
    assert trial.training.optimizer.lr == 0.5
    assert trial.adapter is not None
    assert trial.adapter.rank == 4


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"optimizer.lr": 0}, r"jobs.newsroom with optimizer.lr 0: optimizer.*lr: Input should be greater than 0"),
        ({"batch.micro_sequences": 5}, r"jobs\[1\].batch.micro_sequences: does not divide the batch; change one"),
    ],
)
def test_a_trial_that_cannot_be_is_refused(values: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        plan_trial(config_of(), "newsroom", values)


def test_an_unknown_job_is_refused_with_those_there_are() -> None:
    with pytest.raises(PlanError, match=r"no job 'nws' in jobs; it has news, newsroom, sweep, check"):
        plan_job(config_of(), "nws")
