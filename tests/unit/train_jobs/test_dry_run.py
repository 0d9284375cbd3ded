"""A train job looked at before it runs: its sizes and steps, and early refusals of what cannot work."""

import json
import re
from pathlib import Path

import pytest

from tests.support.tiny_tasks import ARCHITECTURE, save_base
from tests.support.train_site import Site
from train_jobs.__main__ import main


def look(site: Site, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["run", str(site.path), "forecast", "--dry-run", "--json"]) == 0, capsys.readouterr().err
    return dict(json.loads(capsys.readouterr().out))


def refusal(site: Site, capsys: pytest.CaptureFixture[str]) -> str:
    status = main(["run", str(site.path), "forecast", "--dry-run"])
    captured = capsys.readouterr()
    assert status in (1, 2)
    assert captured.out == ""
    return captured.err.splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture
def site(folder: Site) -> Site:
    folder.write()
    return folder


def test_steps_are_known_once_the_data_are_prepared(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(data={"split": {"seed": 7}})
    before = look(site, capsys)
    assert (before["num_steps"], before["run_directory"], before["data_digest"]) == (None, None, None)
    site.prepare()
    capsys.readouterr()
    after = look(site, capsys)
    manifest = json.loads(
        next(site.folder.glob(f"storage/data/days/{after['data_digest'][:12]}/manifest.json")).read_text()
    )
    num_items = manifest["splits"]["train"]["num_items"]
    assert after["num_steps"] == -(-2 * num_items // 8)
    assert after["tokens_per_step"] == 8 * 32
    assert after["base"] == "forecast-base@v1"
    assert after["num_parameters"] == after["num_trained_parameters"] > 10_000
    assert Path(after["run_directory"]).parent == site.folder / "storage" / "runs" / "forecast"
    assert not Path(after["run_directory"]).exists()
    assert look(site, capsys) == after


def test_the_table_fits_a_terminal_of_80_columns(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(
        adapter={"kind": "dora", "rank": 4, "publish": "merged"},
        publish={"model": "forecaster", "require": {"loss": 3.0}},
        evaluate={"every_steps": 20},
    )
    site.prepare()
    capsys.readouterr()
    assert main(["run", str(site.path), "forecast", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 80
    for said in ("forecast-base@v1", "dora, rank 4", "trained, ", "evaluated every 20 steps by loss", "if loss <= 3"):
        assert said in " ".join(shown.split())


def test_an_adapter_trains_little_and_so_takes_less_memory(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    whole = look(site, capsys)
    site.write(adapter={"rank": 2})
    small = look(site, capsys)
    assert small["num_trained_parameters"] < small["num_parameters"] / 4
    assert small["num_parameters"] > whole["num_parameters"]
    assert small["worker_memory"]["optimizer"] < whole["worker_memory"]["optimizer"] / 4


def test_a_model_from_scratch_takes_the_vocabulary_of_the_data(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.write(base={"architecture": ARCHITECTURE})
    found = look(site, capsys)
    assert found["base"].startswith("architecture:")
    assert found["num_parameters"] > 258 * 32


def test_a_classifier_is_counted_with_its_head(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(task="classify")
    site.prepare()
    capsys.readouterr()
    assert look(site, capsys)["num_steps"] > 10


def test_missing_base(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(base={"source": "registry://nobody@latest"})
    assert "nobody" in refusal(site, capsys)


def test_context_longer_than_the_models(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(data={"sequence_tokens": 4096})
    said = re.search(
        r"its context is (\d+) tokens, the data's sequences have 4096; .* sequence_tokens <= (\d+)",
        refusal(site, capsys),
    )
    assert said is not None
    assert said[1] == said[2]


def test_vocabulary_of_another_model(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    small = site.folder / "small"
    if not small.exists():
        save_base(small)
        config = json.loads((small / "config.json").read_text())
        (small / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    site.write(base={"source": f"path://{small}"})
    assert "vocabulary" in refusal(site, capsys)


def test_one_class_is_refused_when_it_is_read(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(
        task="classify",
        data={"inputs": [{"source": f"path://{site.folder}/rows", "format": "folders", "files": "rain/*"}]},
    )
    assert main(["run", str(site.path), "days"]) == 1
    assert "rain" in capsys.readouterr().err


def test_a_schedule_longer_than_the_run(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(schedule={"warmup_steps": 100_000})
    site.prepare()
    capsys.readouterr()
    assert "100000 warm-up and 0 decay steps; limit:" in refusal(site, capsys)


def test_no_place_for_a_worker(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(slots=1, workers=2)
    said = refusal(site, capsys)
    assert "jobs.forecast.workers: 2 workers, and the nodes have places for 1; write `train_slot: 2` under" in said


def test_a_parameter_server_says_what_it_holds_and_whom_a_bound_leaves_idle(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = {"kind": "parameter_server", "max_staleness": 1}
    site.write(slots=4, workers=4, resources={"cpus": 0.5}, strategy=strategy)
    found = look(site, capsys)
    trained = 4 * found["num_trained_parameters"]
    memory = found["worker_memory"]
    assert (memory["messages"], memory["gradients"]) == (trained, trained)
    assert memory["optimizer"] == 0  # the workers that compute have more to hold than the server
    assert "no more than 2 of the 3 computing workers compute at a time; raise it to 2" in found["notes"][0]
    site.write(slots=4, workers=3, resources={"cpus": 0.5}, strategy=strategy)
    assert look(site, capsys)["notes"] == []


def test_weights_that_fit_no_node(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {**ARCHITECTURE, "hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32}
    site.write(base={"architecture": wide}, memory="1GiB")
    said = refusal(site, capsys)
    assert "weights, gradients and optimizer states, and the largest node has 1.0GiB; use strategy fsdp" in said
