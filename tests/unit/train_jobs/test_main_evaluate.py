"""``python -m train_jobs run`` on evaluate jobs, and a look at tune jobs: numbers, what is kept, what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from cluster.runs.page.render import render
from cluster.runs.record import read_run
from tests.support.corpora import save_tokenizer, write_days
from tests.support.tiny_models import save_tiny_classifier, save_tiny_model
from train_jobs.__main__ import main

VOCABULARY = 258


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    rows = write_days(tmp_path / "rows", ("calm", "storm"), num_documents=60)
    save_tokenizer(tmp_path / "tokenizer")
    save_tiny_classifier(tmp_path / "sorter", "bert", ("storm", "calm"), vocab_size=VOCABULARY)
    save_tiny_classifier(tmp_path / "stranger", "bert", ("ham", "spam"), vocab_size=VOCABULARY)
    save_tiny_model(tmp_path / "writer", "llama", vocab_size=VOCABULARY)
    for model in ("sorter", "stranger", "writer"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tmp_path / "tokenizer" / name, tmp_path / model / name)
    path = tmp_path / "jobs.yaml"
    inputs = f'inputs: [{{source: "path://{rows}", format: FORMAT}}], tokenizer: "path://{tmp_path}/tokenizer"'
    path.write_text(
        f"""\
name: weather
storage: {tmp_path}/storage
cluster: {{nodes: [{{name: box, resources: {{CPU: 1, train_slot: 1}}}}]}}
jobs:
  - {{name: days, kind: prepare, task: classify, {inputs.replace("FORMAT", "folders")}, sequence_tokens: 32,
      split: {{eval_fraction: 0.3}}}}
  - {{name: prose, kind: prepare, task: lm, {inputs.replace("FORMAT", "text")}, sequence_tokens: 32,
      split: {{eval_fraction: 0.3}}}}
  - {{name: check, kind: evaluate, model: "path://{tmp_path}/sorter", data: days}}
  - {{name: strange, kind: evaluate, model: "path://{tmp_path}/stranger", data: days}}
  - {{name: read, kind: evaluate, model: "path://{tmp_path}/writer", data: prose, split: train}}
  - name: learn
    kind: train
    task: lm
    base: {{source: "path://{tmp_path}/writer"}}
    data: prose
    duration: {{steps: 4}}
    batch: {{sequences: 4, micro_sequences: 4}}
    optimizer: {{kind: adamw, lr: 1.0e-3}}
    evaluate: {{every_steps: 2}}
  - {{name: sweep, kind: tune, job: learn, search: random, trials: 3,
      space: {{optimizer.lr: {{log_uniform: [1.0e-5, 1.0e-2]}}, clip_norm: {{choice: [1.0, null]}}}}}}
  - {{name: wrong, kind: tune, job: learn, search: grid, space: {{batch.micro_sequences: {{choice: [4, 3]}}}}}}
"""
    )
    return path


def test_a_classifier_is_measured_and_its_numbers_are_kept(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(yaml), "check", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    metrics = values["metrics"]
    assert values["model"] == "check-base@v1"
    assert [row["label"] for row in metrics["classes"]] == ["storm", "calm"]
    assert metrics["num_items"] == sum(row["support"] for row in metrics["classes"]) > 5
    directory = Path(values["run_directory"])
    record = read_run(directory, yaml.parent / "storage")
    assert record.state.status == "finished"
    assert record.data is not None
    assert record.data.name == "days"
    assert record.evaluation is not None
    assert record.evaluation.metrics == metrics
    assert "check-base@v1 on split eval of days" in render(record)

    assert main(["run", str(yaml), "check"]) == 0
    shown = capsys.readouterr().out
    assert "macro_f1" in shown
    assert "storm" in shown
    assert len(list(directory.parent.iterdir())) == 1, "the same version on the same data is the same run"


def test_a_language_model_has_perplexity_and_bits_per_byte(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(yaml), "read", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["perplexity"] > 10
    assert metrics["bits_per_byte"] > 1
    assert metrics["num_targets"] > 100


def test_labels_that_the_model_does_not_know_are_named(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(yaml), "strange"]) == 1
    assert "the model does not know labels 'calm', 'storm' of the data" in capsys.readouterr().err
    [directory] = (yaml.parent / "storage" / "runs" / "strange").iterdir()
    state = read_run(directory, yaml.parent / "storage").state
    assert state.status == "failed"
    assert "does not know labels" in str(state.error)


def test_an_evaluation_that_breaks_has_failed(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(yaml), "check"]) == 0
    storage = yaml.parent / "storage"
    [labels] = storage.glob("data/days/*/eval-labels.bin")
    labels.write_bytes(b"\x7f" * labels.stat().st_size)
    with pytest.raises(IndexError):
        main(["run", str(yaml), "check"])
    [directory] = (storage / "runs" / "check").iterdir()
    assert read_run(directory, storage).state.status == "failed"


def test_a_look_at_an_evaluation_measures_nothing(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(yaml), "check", "--dry-run"]) == 0
    assert "check-base@v1" in capsys.readouterr().out
    assert not (yaml.parent / "storage" / "runs").exists()


def test_a_look_at_a_sweep_shows_its_trials(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(yaml), "sweep", "--dry-run", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert len(points) == 3
    assert all(1e-5 <= point["optimizer.lr"] <= 1e-2 and point["clip_norm"] in (1.0, None) for point in points)
    assert main(["run", str(yaml), "sweep", "--dry-run"]) == 0
    assert "optimizer.lr" in capsys.readouterr().out


def test_a_trial_that_cannot_be_is_refused_before_any_begins(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(yaml), "wrong", "--dry-run"]) == 2
    assert "jobs.learn with batch.micro_sequences 3: " in capsys.readouterr().err
