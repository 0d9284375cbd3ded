"""``python -m train_jobs run`` on prepare jobs: the data, what is shown of them, and what is refused."""

import json
from pathlib import Path

import pytest

from tests.support.corpora import save_tokenizer, write_days
from train_jobs.__main__ import main
from train_jobs.data.shards import Shards


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    rows = write_days(tmp_path / "rows", ("calm", "storm"), num_documents=60)
    save_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "jobs.yaml"
    path.write_text(
        f"""\
name: weather
storage: {tmp_path}/storage
cluster: {{nodes: [{{name: box, resources: {{CPU: 1}}}}]}}
jobs:
  - name: days
    kind: prepare
    task: classify
    inputs: [{{source: "path://{rows}", format: folders}}]
    tokenizer: path://{tmp_path}/tokenizer
    sequence_tokens: 32
    split: {{eval_fraction: 0.2}}
"""
    )
    return path


def test_a_job_is_shown_done_and_found_done(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(yaml), "days", "--dry-run"]) == 0
    assert "not prepared yet" in capsys.readouterr().out
    assert not (yaml.parent / "storage" / "data" / "days").exists()

    assert main(["run", str(yaml), "days", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["manifest"]["labels"] == ["calm", "storm"]
    shards = Shards.open(Path(values["directory"]), "train")
    assert len(shards) == values["manifest"]["splits"]["train"]["num_sequences"] > 30

    assert main(["run", str(yaml), "days", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"digest {values['manifest']['digest'][:12]}" in shown
    assert "storm" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        (("job", "nights"), 2, "jobs: there is no job 'nights' in weather; it has days"),
        (("path", "rows"), 1, "does not exist on this machine"),
        (("text", "kind: prepare"), 2, "must say its kind"),
        (("text", "sequence_tokens: 32"), 2, "sequence_tokens: is missing"),
    ],
)
@pytest.mark.parametrize("how", ["run", "dry run"])
def test_what_cannot_be_is_one_line_and_a_status(
    yaml: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], status: int, says: str, how: str
) -> None:
    what, which = change
    if what == "text":
        yaml.write_text(yaml.read_text().replace(f"    {which}\n", ""))
    if what == "path":
        (yaml.parent / which).rename(yaml.parent / "elsewhere")
    job = which if what == "job" else "days"
    assert main(["run", str(yaml), job, *(["--dry-run"] if how == "dry run" else [])]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert "Traceback" not in captured.err


def test_a_storage_that_cannot_be_written_is_one_line(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (yaml.parent / "storage").write_text("a file where a directory should be")
    assert main(["run", str(yaml), "days"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "storage" in line
    assert line.endswith("check that storage exists, is writable, and has space")


def test_other_code_than_was_submitted_is_refused(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(yaml), "days", "--code-digest", "0" * 64]) == 1
    assert "runs other code than the plan was made with" in capsys.readouterr().err
