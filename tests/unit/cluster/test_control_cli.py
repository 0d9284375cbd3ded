"""The command line: exit statuses, plain errors, JSON for programs, and a start without heavy imports."""

import json
import sys
from pathlib import Path

import pytest

from cluster.cli import main, own_command
from cluster.control.ports import unused_ports
from tests.unit.cluster.plan_examples import SMOLLM2


@pytest.fixture
def yaml(tmp_path) -> Path:
    path = tmp_path / "c.yaml"
    ray_port, dashboard_port, http_port = unused_ports(3)
    path.write_text(
        f"name: test\nstorage: {tmp_path}/storage\n"
        f"cluster:\n  provider: {{kind: local, ray_port: {ray_port}, dashboard_port: {dashboard_port}}}\n"
        "  nodes:\n    - {name: box, resources: {CPU: 2, memory: 8GiB}}\n"
        f"gateway:\n  http: {{port: {http_port}}}\nmodels:\n{SMOLLM2}"
    )
    return path


def test_a_valid_config(yaml, capsys):
    assert main(["validate", str(yaml)]) == 0
    assert capsys.readouterr().out == f"{yaml} is valid: cluster test with 1 models (smollm2).\n"


def test_a_wrong_config_is_status_2_with_every_mistake_on_standard_error(yaml, capsys):
    yaml.write_text(yaml.read_text().replace("stages: 2", "stages: 0").replace("CPU: 2", "CPU: -1"))
    assert main(["validate", str(yaml)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 2
    assert "Traceback" not in captured.err


def test_a_missing_config_is_status_2(tmp_path, capsys):
    assert main(["plan", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["launch"], ["up"], ["logs", "m", "-n", "0"], ["up", "x", "--timeout", "soon"]])
def test_wrong_usage_is_status_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_version_and_help(capsys):
    for argv in (["--version"], ["-h"], ["up", "-h"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 0
    assert "exit status: 0 done, 1 failed, 2 wrong" in capsys.readouterr().out


def test_a_plan_before_the_import_says_what_is_not_known_and_changes_nothing(yaml, capsys):
    assert main(["plan", str(yaml), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["models"][0]["args"] is None
    assert [action["kind"] for action in found["actions"]][:2] == ["import_model", "start_cluster"]
    assert main(["plan", str(yaml)]) == 0
    shown = capsys.readouterr().out
    assert "known after import" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_status_and_down_of_what_does_not_run(yaml, capsys):
    assert main(["status", str(yaml), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ray"] == "stopped"
    assert main(["status", str(yaml)]) == 0
    assert main(["down", str(yaml)]) == 0
    assert "Nothing of cluster test runs." in capsys.readouterr().out


def test_what_fails_is_status_1_in_one_line(yaml, capsys):
    (port,) = unused_ports(1)
    assert main(["logs", "smollm2", "--dashboard", f"http://127.0.0.1:{port}"]) == 1
    assert main(["logs", "smollm2", str(yaml)]) == 1
    assert main(["chat", "smollm2", "hi", "--url", f"http://127.0.0.1:{port}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "start it with `manta up" in lines[1]


def test_storage_that_cannot_be_written_is_status_1_in_one_line(yaml, tmp_path, capsys):
    (tmp_path / "storage").write_text("a file, where a directory should be")
    for argv in (["up", str(yaml)], ["down", str(yaml)], ["models", "list", "--config", str(yaml)]):
        assert main(argv) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert str(tmp_path / "storage") in line
        assert "check that storage exists" in line


def test_two_places_for_the_cluster_are_wrong_usage(yaml, capsys):
    assert main(["logs", "smollm2", str(yaml), "--dashboard", "http://127.0.0.1:1"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_lines_to_copy_call_the_command_that_was_called(tmp_path, monkeypatch):
    script = tmp_path / "bin" / "manta"
    script.parent.mkdir()
    script.write_text("#!/bin/sh")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "/nowhere")
    assert own_command() == str(script)
    monkeypatch.setenv("PATH", str(script.parent))
    assert own_command() == "manta"
    monkeypatch.setattr(sys, "argv", ["cluster/__main__.py"])
    assert own_command() == f"{sys.executable} -m cluster"


def test_the_schema_is_json(capsys):
    assert main(["config", "schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)
