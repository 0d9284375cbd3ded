"""What a task is made of: resolved values only, as the YAML section made them, without defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.config.jobs_train import JobTask


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Start from a model's directory on this machine: ``config.json`` and safetensors."""

    kind: Literal["checkpoint"] = "checkpoint"
    directory: Path
    name: str
    """What a published adapter names as its base, such as ``registry://smollm2@v1``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Start from random weights; ``settings`` are those of a transformers config, ``model_type`` among them.

    The vocabulary's size and the ids of special tokens are the tokenizer's, and are not given here.
    """

    kind: Literal["architecture"] = "architecture"
    settings: Mapping[str, Any]


BaseSpec = Checkpoint | Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """Train low-rank additions to the layers' matrices, and leave the base as it is."""

    kind: Literal["lora", "dora"]
    rank: int
    alpha: float
    """Additions are scaled by ``alpha / rank``."""
    dropout: float
    targets: Literal["auto"] | tuple[str, ...]
    """Last parts of the names of matrices (``q_proj``); auto takes every matrix of every layer."""
    publish: Literal["merged", "adapter"]
    """A whole model with the additions in its weights, or the additions alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """Everything a task is told, besides what the trainer is told and the data themselves."""

    task: JobTask
    base: BaseSpec
    tokenizer: Path
    """Directory of the tokenizer that the data were prepared with: ``tokenizer/`` of the prepared data."""
    vocab_size: int
    """Of that tokenizer, as the data's manifest says."""
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int
    """What the data are padded with."""
    sequence_tokens: int
    labels: tuple[str, ...] | None
    """Label of each number in the data; None unless the task is classify."""
    adapter: AdapterSpec | None
    dpo_beta: float | None
    """How strongly dpo holds the model to the reference; None for other tasks."""
    evaluation_sequences: int
    """Sequences of one forward pass of an evaluation, per worker."""
    export_dtype: Literal["base", "float32", "bfloat16"]
    """Of published weights; base is that of the checkpoint, and float32 for an architecture."""
