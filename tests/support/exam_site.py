"""Tasks in lm-eval's YAML over local files, a tiny random model to be asked them, and a config with such a job."""

import json
import shutil
from pathlib import Path

from tests.support.corpora import CHAT_TEMPLATE, save_tokenizer
from tests.support.tiny_models import save_tiny_classifier, save_tiny_model

VOCABULARY = 258
QUESTIONS = [
    ("Is snow warm?", ["yes", "no"], 1),
    ("Is rain wet?", ["yes", "not at all"], 0),
    ("Is the sun cold?", ["certainly", "no"], 1),
]
PROSE = ["calm day number one", "storm on the second day, and calm on the third"]

_WEATHER = """\
task: weather
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/weather.jsonl}}, cache_dir: {folder}-cache}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.5}}
"""
_PROSE = """\
task: prose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/prose.jsonl}}, cache_dir: {folder}-cache}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
num_fewshot: 0
metadata: {{version: 2.0}}
"""


def write_tasks(folder: Path) -> Path:
    """Tasks ``weather`` (multiple choice), ``prose`` (rolling likelihood) and ``lost``, which has no documents."""
    folder.mkdir(parents=True)
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    (folder / "weather.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE))
    (folder / "weather.yaml").write_text(_WEATHER.format(folder=folder))
    (folder / "prose.yaml").write_text(_PROSE.format(folder=folder))
    lost = (
        _WEATHER.format(folder=folder)
        .replace("weather.jsonl", "nowhere.jsonl")
        .replace("task: weather", "task: lost")
    )
    (folder / "lost.yaml").write_text(lost)
    return folder


def write_site(root: Path, harness: str) -> Path:
    """A config whose jobs ask a model, one that chats and a classifier; ``harness`` is their section."""
    save_tokenizer(root / "tokenizer", chat_template=None)
    save_tiny_model(root / "writer", "llama", vocab_size=VOCABULARY)
    save_tiny_model(root / "talker", "llama", vocab_size=VOCABULARY)
    save_tiny_classifier(root / "sorter", "bert", ("storm", "calm"), vocab_size=VOCABULARY)
    for model in ("writer", "talker", "sorter"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(root / "tokenizer" / name, root / model / name)
    (root / "talker" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    path = root / "exam.yaml"
    path.write_text(
        f"""\
name: school
storage: {root}/storage
cluster: {{nodes: [{{name: box, resources: {{CPU: 1}}}}]}}
models: [{{name: sorter, source: "path://{root}/sorter", task: classify}}]
jobs:
  - {{name: exam, kind: evaluate, model: "path://{root}/writer", harness: {harness}, batch_sequences: 2}}
  - {{name: chat-exam, kind: evaluate, model: "path://{root}/talker", harness: {harness}, batch_sequences: 2}}
  - {{name: sorted-exam, kind: evaluate, model: "path://{root}/sorter", harness: {harness}}}
"""
    )
    return path
