"""One entry of ``jobs:``: data to prepare, a model to train, a sweep over its settings, or a model to evaluate."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field

from cluster.config.base import Name, Sha256, StrictModel, refuse
from cluster.config.jobs_optimizers import MAX_STEPS
from cluster.config.jobs_train import JobResources, JobTask, TrainJob
from cluster.config.sources import DataSource, Source

Format = Literal["folders", "text", "lines", "jsonl", "csv", "parquet", "dialogs"]

TASK_FORMATS: dict[JobTask, tuple[Format, ...]] = {
    "lm": ("text", "lines", "jsonl", "csv", "parquet"),
    "classify": ("folders", "jsonl", "csv", "parquet"),
    "sft": ("dialogs", "jsonl", "parquet"),
    "dpo": ("jsonl", "csv", "parquet"),
}
"""Formats that can hold the rows of a task."""


class FieldsSection(StrictModel):
    """Names of the columns that hold what a row consists of (jsonl, csv, parquet)."""

    text: str = "text"
    """Column of the text (lm, classify)."""
    label: str = "label"
    """Column of the label (classify)."""
    messages: str = "messages"
    """Column of the conversation: a list of ``{role, content}`` (sft)."""
    prompt: str = "prompt"
    """Column of the prompt (dpo)."""
    chosen: str = "chosen"
    """Column of the better answer (dpo)."""
    rejected: str = "rejected"
    """Column of the worse answer (dpo)."""


class InputSection(StrictModel):
    """One source of text."""

    source: DataSource
    """Where it comes from: ``wheel://``, ``npm://``, ``hf://`` or ``path://``."""
    sha256: Sha256 | None = None
    """SHA-256 of the downloaded archive, the single file, or the directory's files; other bytes are refused."""
    format: Format
    """``folders``: a file is a document, its top folder the label. ``text``: a file is a document. ``lines``: a line
    is. ``dialogs``: YAML or JSON with ``conversations``, lists of turns, the user's first. Else one row each."""
    files: str | None = None
    """Glob of the files to read, relative to the source; without it, those whose suffix goes with the format."""
    fields: FieldsSection = FieldsSection()
    """Names of columns, where they are not the usual ones."""
    encoding: str = "utf-8"
    """Encoding of the text, by its name in Python."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each of its sequences comes up in one epoch; change it to mix several inputs."""


class CleanSection(StrictModel):
    """What is done to each document, besides unified line ends and no white space at its ends."""

    min_chars: Annotated[int, Field(ge=1, le=2**30)] = 1
    """Documents with fewer characters are left out, and counted."""
    deduplicate: bool = True
    """Whether a document that was there before is left out, and counted."""
    normalize: Literal["NFC", "NFKC"] | None = "NFC"
    """Unicode normalization; null leaves characters as they are."""


class SplitSection(StrictModel):
    """Which documents are held out for evaluation; each is decided by its own hash, so more data moves none."""

    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the documents that is held out; with 0 nothing can be evaluated."""
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Another seed holds out other documents."""


class PrepareJob(StrictModel):
    """Text becomes sequences of tokens of one length, on disk, once."""

    name: Name
    """Name of the job; training jobs refer to its data by it."""
    kind: Literal["prepare"]
    """``prepare``: text becomes training data."""
    task: JobTask
    """What it is for, which decides what a row must have: ``lm`` text, ``classify`` text and label, ``sft``
    messages, ``dpo`` prompt, chosen and rejected."""
    inputs: Annotated[tuple[InputSection, ...], Field(min_length=1, strict=False)]
    """Where the text comes from."""
    tokenizer: Source
    """A model, by its source, whose tokenizer turns the text into tokens: the one that is to be trained."""
    sequence_tokens: Annotated[int, Field(ge=2, le=2**20)]
    """Tokens of each sequence, at most the model's context. Short documents share one (lm, sft), long ones of lm go
    on in the next; memory of training grows with it."""
    clean: CleanSection = CleanSection()
    """What is done to each document."""
    split: SplitSection = SplitSection()
    """What is held out for evaluation."""
    labels: Annotated[tuple[str, ...], Field(min_length=2, strict=False)] | None = None
    """All labels there may be, in the order of their numbers (classify); without it, those that are found, sorted."""
    max_bad_rows: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Malformed rows that are tolerated, and counted; one more ends the job and names the first ones."""
    workers: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Processes that read and tokenize: 1 is the job's own, more are actors of Ray Data. The bytes are the same."""


def _check_folder(path: str) -> str:
    if not path.startswith("/"):
        refuse(
            "is not an absolute path", limit="/absolute/folder", remedy="write the whole path, on all nodes the same"
        )
    return path


class HarnessSection(StrictModel):
    """Tasks of EleutherAI's lm-evaluation-harness, an extra: ``pip install 'manta-cluster[lm-eval]'``."""

    tasks: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, strict=False)]
    """Names of tasks, groups or tags that lm-eval knows, or that a file in ``include`` defines."""
    include: Annotated[str, AfterValidator(_check_folder)] | None = None
    """Folder with tasks of your own, in lm-eval's YAML, by its absolute path on every node that may run the job."""
    num_fewshot: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Solved examples before each question; without it, as many as the task says."""
    limit: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Only the first so many documents of each task, to try it out; without it, all."""
    chat_template: bool = False
    """Whether questions are put as the model's chat template says; for models that were trained to chat."""


class EvaluateJob(StrictModel):
    """A model that is there is measured, on prepared data or by lm-eval's tasks."""

    name: Name
    """Name of the job."""
    kind: Literal["evaluate"]
    """``evaluate``: a model is measured."""
    model: Source
    """The model, usually ``registry://NAME@ALIAS``."""
    data: Name | None = None
    """The prepare job whose data it is measured on; its task decides what is measured. Either this or ``harness``."""
    split: Literal["eval", "train"] | None = None
    """Which part of the data; ``eval`` when nothing is said."""
    harness: HarnessSection | None = None
    """Tasks of lm-eval that it is measured by. Either this or ``data``."""
    batch_sequences: Annotated[int, Field(ge=1, le=65536)] = 8
    """Sequences of one forward pass; larger is faster and takes more memory."""
    resources: JobResources = JobResources()
    """What it reserves in Ray."""


class SearchRange(StrictModel):
    """Values of one setting that a sweep chooses from: exactly one of the keys."""

    uniform: Annotated[tuple[float, float], Field(strict=False)] | None = None
    """From the first to the second number, all alike."""
    log_uniform: Annotated[tuple[float, float], Field(strict=False)] | None = None
    """From the first to the second number, orders of magnitude alike; for learning rates."""
    integer: Annotated[tuple[int, int], Field(strict=False)] | None = None
    """Whole numbers from the first to the second, both included."""
    choice: Annotated[tuple[Any, ...], Field(min_length=1, strict=False)] | None = None
    """One of these; what ``search: grid`` needs."""


class StopSection(StrictModel):
    """Trials that fall behind are ended early."""

    kind: Literal["asha"] = "asha"
    """``asha``: at growing numbers of steps only the best share of the trials goes on."""
    grace_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    """Steps that every trial gets; a multiple of the job's ``evaluate.every_steps``, at which trials are compared."""
    keep_one_of: Annotated[int, Field(ge=2, le=16)] = 3
    """One of so many trials goes on from each rung to the next, which is so many times as long."""


class TuneJob(StrictModel):
    """A sweep: a train job runs with several values of its settings, and the best run is published."""

    name: Name
    """Name of the job."""
    kind: Literal["tune"]
    """``tune``: a train job runs with several values of its settings."""
    job: Name
    """The train job that is varied."""
    search: Literal["random", "grid", "tpe"] = "random"
    """``grid`` tries every combination, ``random`` draws, ``tpe`` draws where good trials were."""
    trials: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """How many trials ``random`` and ``tpe`` make; ``grid`` makes as many as there are combinations."""
    space: dict[str, SearchRange]
    """Settings of the job by their dotted path (``optimizer.lr``), and the values to choose from."""
    metric: str | None = None
    """What is compared; without it, ``evaluate.metric`` of the job."""
    stop: StopSection | None = None
    """Ends trials early; without it, all run to their end."""
    concurrent: Annotated[int, Field(ge=1, le=1000)] = 1
    """Trials that run at the same time, each with the workers of the job."""
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Of the draws."""


JobConfig: TypeAlias = PrepareJob | TrainJob | TuneJob | EvaluateJob
