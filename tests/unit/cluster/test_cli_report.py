"""``manta report``: where the page goes, which run it is about, and what cannot be shown."""

import json
from pathlib import Path

import pytest

from cluster.cli import main
from tests.support.run_directories import write_run

CONFIG = """\
name: box
storage: {storage}
cluster:
  provider: {{kind: local}}
  nodes: [{{name: box, resources: {{CPU: 2}}}}]
models:
  - {{name: smollm2, source: "registry://smollm2@latest", task: generate, context_tokens: 512}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(storage=tmp_path))
    return path


def test_the_page_goes_beside_the_run_or_where_one_says(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_run(tmp_path)
    assert main(["report", str(config), "newsroom"]) == 0
    assert capsys.readouterr().out == f"newsroom-3fa9c1d2, finished: {directory / 'report.html'}\n"
    assert (directory / "report.html").read_text().startswith("<!doctype html>")
    out = tmp_path / "page.html"
    command = ["report", str(config), "newsroom", "--run", directory.name, "--out", str(out), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(out)
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speeches"], "job speeches has no run in"),
        (["newsroom", "--run", "x"], "job newsroom has no run x; it has newsroom-3fa9c1d2"),
    ],
)
def test_runs_that_are_not_there(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_run(tmp_path)
    assert main(["report", str(config), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_said_in_one_line(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    assert main(["report", str(config), "newsroom", "--out", str(tmp_path / "no" / "page.html")]) == 1
    assert "No such file or directory" in capsys.readouterr().err
