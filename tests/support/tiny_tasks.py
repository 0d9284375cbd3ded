"""Tiny bases, tokenizers, prepared data and specs of every task: what tests of training real architectures need."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from cluster.config.jobs_train import JobTask
from tests.support.corpora import save_tokenizer
from tests.support.prepared_data import Documents, write_data
from tests.support.tiny_models import save_tiny_model
from train_jobs.data.shards import Shards
from train_jobs.tasks import language
from train_jobs.tasks.build import build_task
from train_jobs.tasks.spec import AdapterSpec, Checkpoint, TaskSpec

VOCABULARY, LENGTH = 258, 24
LABELS = ("label0", "label1", "label2")
LORA = AdapterSpec(kind="lora", rank=4, alpha=8.0, dropout=0.0, targets="auto", publish="merged")
ENCODERS = ("bert", "roberta")
ARCHITECTURE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def save_base(directory: Path, model_type: str = "llama", **overrides: Any) -> Checkpoint:
    """A tiny causal model, or an encoder for ``bert`` and ``roberta``, with a tokenizer beside it."""
    if model_type in ENCODERS:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        kept = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.2} | sizes | overrides
        AutoModel.from_config(AutoConfig.for_model(model_type, **kept)).save_pretrained(directory)
    else:
        save_tiny_model(directory, model_type, vocab_size=VOCABULARY, **overrides)
    tokenizer = directory / "tokenizer"
    save_tokenizer(tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, directory / name)
    return Checkpoint(directory=directory, name="registry://base@v1")


def task_spec(task: JobTask, base: Checkpoint, **changes: Any) -> TaskSpec:
    """The spec of a task on ``base`` and on the data of :func:`write_task_data`."""
    plain = TaskSpec(
        task=task,
        base=base,
        tokenizer=base.directory,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        sequence_tokens=LENGTH,
        labels=LABELS if task == "classify" else None,
        adapter=None,
        dpo_beta=0.1 if task == "dpo" else None,
        evaluation_sequences=4,
        export_dtype="base",
    )
    return replace(plain, **changes)


def open_task(spec: TaskSpec, data: Path, rows_at_once: int = 4096) -> tuple[Any, Any, Any]:
    """The task, and what the trainer takes to train and to evaluate it on.

    This process scores ``rows_at_once`` targets at a time from now on.
    """
    language.ROWS_AT_ONCE = rows_at_once
    opened = open_task_data(data, spec.task)
    return build_task(spec), opened["train"], opened["eval"]


def open_task_data(directory: Path, task: JobTask) -> dict[str, Any]:
    """What the trainer takes, by split."""
    if task != "dpo":
        return {split: Shards.open(directory, split) for split in ("train", "eval")}
    return {
        split: {side: Shards.open(directory, split, side=side) for side in ("chosen", "rejected")}
        for split in ("train", "eval")
    }


def write_task_data(directory: Path, task: JobTask, num_sequences: int = 24) -> dict[str, Any]:
    """Data of a task with something to learn in it; returns what the trainer takes, by split."""
    random = np.random.default_rng(5)
    rules: Mapping[JobTask, Any] = {"lm": _counting, "sft": _counting, "dpo": _answers, "classify": _documents}
    splits, rejected, labels = {}, {}, {}
    for split, number in (("train", num_sequences), ("eval", 6)):
        made = [rules[task](random, index) for index in range(number)]
        splits[split] = [one[0] for one in made]
        rejected[split] = [one[1] for one in made]
        labels[split] = [index % len(LABELS) for index in range(number)]
    write_data(
        directory,
        splits,
        sequence_tokens=LENGTH,
        vocab_size=VOCABULARY,
        task=task,
        labels=labels if task == "classify" else None,
        rejected=rejected if task == "dpo" else None,
    )
    return open_task_data(directory, task)


def _counting(random: np.random.Generator, _: int) -> tuple[Documents, Documents]:
    """Two documents of numbers that count up, packed; padding of random length."""
    lengths = random.integers(5, 12, 2)
    documents = [(np.arange(length) + random.integers(10, 60)).tolist() for length in lengths]
    return documents, documents


def _answers(random: np.random.Generator, _: int) -> tuple[Documents, Documents]:
    """The better answer counts up, the worse one down."""
    start, length = int(random.integers(40, 60)), int(random.integers(6, 20))
    return [list(range(start, start + length))], [list(range(start, start - length, -1))]


def _documents(random: np.random.Generator, index: int) -> tuple[Documents, Documents]:
    """Tokens of a label are of its own range."""
    low = 10 + 20 * (index % len(LABELS))
    document = [[2, *random.integers(low, low + 20, int(random.integers(4, 20))).tolist()]]
    return document, document
