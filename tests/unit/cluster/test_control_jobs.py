"""Submitting, following, listing and stopping jobs, against a server that answers as Ray's job server does."""

import io
import json
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from cluster.cli import main
from cluster.control.code import code_digest
from cluster.control.follow import TerminalView
from cluster.runs.files import data_directory, job_directory
from cluster.runs.progress import Progress, read_progress
from cluster.runs.state import RunState, write_state
from tests.support.fake_job_server import FakeJobServer


@pytest.fixture
def server() -> Iterator[FakeJobServer]:
    with FakeJobServer().serving() as server:
        yield server


@pytest.fixture
def yaml(tmp_path: Path, server: FakeJobServer) -> Path:
    path = tmp_path / "weather.yaml"
    path.write_text(
        f"""\
name: weather
storage: {tmp_path}/storage
cluster:
  provider: {{kind: existing, dashboard: "{server.url}"}}
  nodes: [{{name: box, resources: {{CPU: 1}}}}]
jobs:
  - name: days
    kind: prepare
    task: lm
    inputs: [{{source: "path:///days", format: text}}]
    tokenizer: registry://small@latest
    sequence_tokens: 32
  - name: forecast
    kind: train
    task: lm
    base: {{source: registry://small@latest}}
    data: days
    batch: {{sequences: 8, micro_sequences: 8}}
    duration: {{steps: 300}}
    optimizer: {{kind: adamw, lr: 1e-4}}
"""
    )
    return path


def test_a_job_is_submitted_with_its_config_and_the_code_it_was_planned_with(
    yaml: Path, server: FakeJobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(yaml), "forecast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"job": "forecast", "submission": "manta-weather-forecast-1"}
    job = server.jobs["manta-weather-forecast-1"]
    run = f"exec python -m train_jobs run weather.yaml forecast --code-digest {code_digest()}"
    assert job["entrypoint"] == run
    assert job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
    [(name, content)] = server.packages.items()
    assert job["runtime_env"]["working_dir"] == f"gcs://{name}"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.read("weather.yaml") == yaml.read_bytes()


def test_code_from_an_archive_comes_with_the_job(yaml: Path, server: FakeJobServer) -> None:
    text = yaml.read_text().replace("CPU: 1}}]", "CPU: 1}}]\n  code: {kind: uri, uri: s3://b/manta.zip}")
    yaml.write_text(text)
    assert main(["train", str(yaml), "days"]) == 0
    [job] = server.jobs.values()
    assert job["runtime_env"]["py_modules"] == ["s3://b/manta.zip"]


def test_a_job_runs_once_at_a_time_and_goes_on_when_submitted_again(
    yaml: Path, server: FakeJobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(yaml), "forecast"]) == 0
    assert main(["train", str(yaml), "forecast"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "job forecast of weather is running already, as manta-weather-forecast-1" in said
    assert f"manta stop {yaml} forecast" in said
    assert main(["train", str(yaml), "days"]) == 0
    server.end("manta-weather-forecast-1", "FAILED")
    assert main(["train", str(yaml), "forecast"]) == 0
    assert [name for name in server.jobs if "forecast" in name] == [
        "manta-weather-forecast-1",
        "manta-weather-forecast-2",
    ]


@pytest.mark.parametrize(
    ("state", "status", "says"),
    [
        ("SUCCEEDED", 0, "forecast is done."),
        ("FAILED", 1, "forecast failed; its log says why. Submit it again to continue it."),
        ("STOPPED", 1, "forecast was stopped; submit it again to continue it."),
    ],
)
def test_following_shows_the_log_and_gives_the_outcome_as_status(
    yaml: Path, server: FakeJobServer, capsys: pytest.CaptureFixture[str], state: str, status: int, says: str
) -> None:
    server.scripts["manta-weather-forecast-1"] = (["reading", "step 1 of 300", "the end"], state)
    assert main(["train", str(yaml), "forecast", "--follow"]) == status
    said = capsys.readouterr().err.splitlines()
    assert said == ["Submitted forecast as manta-weather-forecast-1.", "reading", "step 1 of 300", "the end", says]


def test_a_running_job_is_followed_rather_than_submitted_twice(
    yaml: Path, server: FakeJobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(yaml), "forecast"]) == 0
    server.write("manta-weather-forecast-1", "under way")
    server.loses_logs = server.ends_when_lost = True
    assert main(["train", str(yaml), "forecast", "--follow"]) == 0
    said = capsys.readouterr().err
    assert "forecast is running already; this is manta-weather-forecast-1." in said
    assert said.splitlines()[-2:] == ["under way", "forecast is done."]
    assert len(server.jobs) == 1


def test_ctrl_c_leaves_the_job_running_and_says_so(yaml: Path, server: FakeJobServer) -> None:
    command = [sys.executable, "-m", "cluster", "train", str(yaml), "forecast", "--follow"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not server.followers and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "forecast goes on without you" in said
    assert "Traceback" not in said
    assert server.jobs["manta-weather-forecast-1"]["status"] == "RUNNING"


def test_jobs_are_listed_with_their_runs(
    yaml: Path, server: FakeJobServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["jobs", str(yaml), "--json"]) == 0
    assert [(row["job"], row["state"]) for row in json.loads(capsys.readouterr().out)] == [
        ("days", "never run"),
        ("forecast", "never run"),
    ]
    prepared = data_directory(yaml.parent / "storage", "days") / "0123456789ab"
    prepared.mkdir(parents=True)
    (prepared / "manifest.json").touch()
    run = job_directory(yaml.parent / "storage", "forecast") / "forecast-1"
    run.mkdir(parents=True)
    state = RunState(
        run_id="forecast-1", job="forecast", kind="train", status="failed", error="disk is full", step=120,
        num_steps=300, began=0.0, changed=0.0,
    )  # fmt: skip
    write_state(run, state)
    assert main(["train", str(yaml), "forecast"]) == 0
    server.end("manta-weather-forecast-1", "FAILED", "entrypoint exited")
    capsys.readouterr()
    assert main(["jobs", str(yaml)]) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith(" forecast"))
    assert row.split()[:3] == ["forecast", "train", "failed"]
    assert {"120/300", "1m", "00s"} <= set(row.split())
    assert "prepared" in next(line for line in shown.splitlines() if line.startswith(" days"))
    assert "forecast: disk is full" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_without_a_config_all_jobs_of_a_cluster_are_listed(
    yaml: Path, server: FakeJobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(yaml), "days"]) == 0
    server.end("manta-weather-days-1", "FAILED")
    assert main(["train", str(yaml), "days"]) == 0
    capsys.readouterr()
    assert main(["jobs", "--dashboard", server.url, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["job"], row["state"], row["submission"]) == ("weather/days", "running", "manta-weather-days-2")
    assert main(["jobs", str(yaml), "--dashboard", server.url]) == 2
    assert "both say where the cluster is" in capsys.readouterr().err


def test_a_run_that_ray_does_not_know_is_told_from_its_directory(
    yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = job_directory(yaml.parent / "storage", "forecast") / "forecast-1"
    run.mkdir(parents=True)
    write_state(
        run,
        RunState(run_id="forecast-1", job="forecast", kind="train", status="running", step=7, began=0.0, changed=0.0),
    )
    assert main(["jobs", str(yaml), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[1]
    assert (row["state"], row["step"], row["submission"]) == ("interrupted", 7, None)


def test_stopping_waits_until_the_job_has_ended(
    yaml: Path, server: FakeJobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stop", str(yaml), "forecast"]) == 1
    assert "job forecast of weather was never submitted; there is nothing to stop" in capsys.readouterr().err
    assert main(["train", str(yaml), "forecast"]) == 0
    assert main(["stop", str(yaml), "forecast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "STOPPED"
    assert server.logs["manta-weather-forecast-1"] == ["saved\n"]
    assert main(["stop", str(yaml), "forecast"]) == 1
    assert "has ended already (stopped)" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "stop"])
def test_a_job_that_is_not_in_the_config_is_refused(
    yaml: Path, server: FakeJobServer, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert main([verb, str(yaml), "forcast"]) == 2
    assert "no job 'forcast' in weather; it has days, forecast" in capsys.readouterr().err
    assert not server.jobs


def test_a_cluster_that_does_not_run(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = yaml.read_text()
    start, stop = text.index("  provider:"), text.index("  nodes:")
    yaml.write_text(text[:start] + text[stop:])
    assert main(["train", str(yaml), "days"]) == 1
    assert "cluster weather does not run; start it with `manta up" in capsys.readouterr().err
    assert main(["jobs", str(yaml)]) == 0
    assert "never run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "progress",
    [
        Progress(step=0, num_steps=None),
        Progress(step=120, num_steps=300, loss=2.3125, tokens_per_s=1200.0, left_s=95.0),
        Progress(step=1, num_steps=2, loss=1e-12),
        Progress(step=1, num_steps=2, left_s=3.0),
    ],
)
def test_progress_is_a_line_and_back(progress: Progress) -> None:
    assert read_progress(str(progress)) == progress
    assert read_progress(f"{progress}, and more") is None


def test_progress_on_a_terminal_is_one_bar_below_the_other_lines() -> None:
    stream = StringIO()
    view = TerminalView(Console(file=stream, force_terminal=True, width=80))
    for line in (
        "starting",
        "step 1 of 300, loss 9.1, 900 tokens/s, 301 s left",
        "[bold]evaluated",
        "step 150 of 300, loss 2.3125, 12345 tokens/s, 7250 s left",
    ):
        view.show(line)
    view.close()
    plain = stream.getvalue().splitlines()
    assert plain[0] == "starting"
    assert any(line.endswith("[bold]evaluated") for line in plain)
    last = next(line for line in reversed(plain) if "150/300" in line)
    assert "loss 2.312  12k tokens/s  2h 00m left" in last
