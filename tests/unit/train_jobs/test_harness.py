"""What lm-eval's results become, and what is said where it is not installed or its tasks are not there."""

import sys
from pathlib import Path

import pytest

from cluster.runs.page.results import metric_rows
from tests.support.exam_site import write_site
from train_jobs.__main__ import main
from train_jobs.kinds.measuring.outcome import read_outcome

RESULTS = {
    "results": {
        "boolq": {
            "name": "boolq",
            "alias": "boolq",
            "sample_len": 100,
            "acc,none": 0.61,
            "acc_stderr,none": 0.049,
        },
        "gsm8k": {
            "name": "gsm8k",
            "alias": "gsm8k",
            "sample_len": 1,
            "exact_match,strict-match": 0.0,
            "exact_match_stderr,strict-match": "N/A",
            "word_perplexity,none": float("inf"),
        },
        "both": {"name": "both", "alias": "both", "sample_len": 101, "acc,none": 0.6},
    },
    "versions": {"boolq": 2.0, "gsm8k": 3.0, "both": None},
    "n-shot": {"boolq": 0, "gsm8k": 5},
    "n-samples": {"boolq": {"original": 3270, "effective": 100}, "gsm8k": {"original": 1319, "effective": 1}},
}


def test_results_become_metrics_by_task() -> None:
    measured = read_outcome(RESULTS)
    assert measured.metrics == {
        "boolq/acc": 0.61,
        "boolq/acc_stderr": 0.049,
        "boolq/num_documents": 100,
        "gsm8k/exact_match/strict-match": 0.0,
        "gsm8k/num_documents": 1,
        "both/acc": 0.6,
        "both/num_documents": 101,
    }
    assert measured.notes == (
        "boolq: version 2.0, 100 of 3,270 documents, 0 solved examples before each.",
        "gsm8k: version 3.0, 1 of 1,319 documents, 5 solved examples before each.",
        "gsm8k/word_perplexity is inf, and is left out.",
    )
    assert ("boolq/acc_stderr", "0.049") in metric_rows(measured.metrics)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_without_the_extra_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    yaml = write_site(tmp_path, "{tasks: [boolq]}")
    assert main(["run", str(yaml), "exam"]) == 2
    assert "jobs.exam.harness needs lm-eval, which is not installed; pip install 'manta-cluster[lm-eval]'" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "storage" / "runs").exists()


def test_a_folder_of_tasks_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = write_site(tmp_path, f"{{tasks: [mine], include: {tmp_path}/nowhere}}")
    assert main(["run", str(yaml), "exam"]) == 2
    told = capsys.readouterr().err
    assert f"jobs.exam.harness.include: {tmp_path}/nowhere is not a folder" in told.replace("\n", " ")
