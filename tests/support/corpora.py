"""Small corpora and a byte-level tokenizer on disk, and preparation jobs over them, for tests of data preparation."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster.config.jobs import Format
from cluster.config.jobs_train import JobTask
from cluster.runs.prepared import BadRow
from train_jobs.data.chunking import cut
from train_jobs.data.fetching import fetch
from train_jobs.data.reading import Record, read_chunk
from train_jobs.data.spec import CleanSpec, Fields, InputSpec, PrepareSpec, SplitSpec

END_ID, PAD_ID = 0, 1

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'forbidden' %}{{ raise_exception('not that') }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

FIELDS = Fields(
    text="text", label="label", messages="messages", prompt="prompt", chosen="chosen", rejected="rejected"
)
CLEAN = CleanSpec(min_chars=1, deduplicate=True, normalize="NFC")


def save_tokenizer(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE, context_tokens: int = 64) -> str:
    """A tokenizer in which every byte is a token; ``<|end|>`` is 0 and ``<|pad|>`` 1. Returns its source."""
    vocab = {"<|end|>": END_ID, "<|pad|>": PAD_ID}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[character] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|pad|>"])
    directory.mkdir(parents=True)
    backend.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    config |= {"pad_token": "<|pad|>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": context_tokens}))
    return f"path://{directory}"


def input_of(path: Path, format_: Format, **changes: Any) -> InputSpec:
    """An input that reads ``path``."""
    plain = InputSpec(source=f"path://{path}", format=format_, fields=FIELDS, encoding="utf-8", weight=1.0)
    return replace(plain, **changes)


def job(task: JobTask, inputs: list[InputSpec], tokenizer: str, **changes: Any) -> PrepareSpec:
    """A preparation job with sequences of 16 tokens and nothing held out."""
    plain = PrepareSpec(
        name="corpus",
        task=task,
        inputs=tuple(inputs),
        tokenizer=tokenizer,
        sequence_tokens=16,
        clean=CLEAN,
        split=SplitSpec(eval_fraction=0.0, seed=0),
        max_bad_rows=0,
    )
    return replace(plain, **changes)


def write_days(folder: Path, labels: Sequence[str], *, num_documents: int) -> Path:
    """Documents of one line each, in a folder for each label below ``folder``, which is returned."""
    for number in range(num_documents):
        label = labels[number % len(labels)]
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number}.txt").write_text(f"{label} day number {number}")
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """A file with one JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path, format_: Format, task: JobTask, **changes: Any) -> list[Record | BadRow]:
    """What reading gives for an input, chunk after chunk."""
    spec = input_of(path, format_, **changes)
    found = fetch(spec, downloads=path.parent, work=path.parent / "work", progress=lambda *_: None)
    chunks = cut(found, spec, task, source=0, first_number=0)
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    return [row for chunk in chunks for row in read_chunk(chunk)]
