"""lm-eval itself, where it is installed: tasks over local files put to a tiny model, and what can go wrong."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.runs.page.render import render
from cluster.runs.record import read_run
from tests.support.exam_site import PROSE, QUESTIONS, write_site, write_tasks
from train_jobs.__main__ import main

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def site(root: Path, tasks: str, more: str = "") -> Path:
    return write_site(root, f"{{tasks: [{tasks}], include: {write_tasks(root / 'tasks')}{more}}}")


def nats(directory: Path, context: str, continuation: str) -> tuple[float, int]:
    """Log-likelihood of a continuation, and how many tokens it has, by transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    before, after = tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"]
    prefix = before or [tokenizer.eos_token_id]
    ids_S = torch.tensor(prefix + after)
    with torch.no_grad():
        logs_SV = model(ids_S[None]).logits[0].log_softmax(-1)
    positions = range(len(prefix), len(ids_S))
    return float(sum(logs_SV[position - 1, ids_S[position]] for position in positions)), len(after)


def test_tasks_are_asked_and_the_numbers_are_those_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = site(tmp_path, "weather, prose")
    capsys.readouterr()
    assert main(["run", str(yaml), "exam", "--json"]) == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert "it/s" not in captured.err
    assert captured.err.splitlines()[-1].startswith("Evaluating exam-base@v1 on weather, prose of lm-eval")
    metrics = values["metrics"]

    chosen = [
        max(range(len(choices)), key=lambda number: nats(tmp_path / "writer", question, f" {choices[number]}")[0])
        for question, choices, _ in QUESTIONS
    ]
    right = [number == answer for number, (_, _, answer) in zip(chosen, QUESTIONS, strict=True)]
    assert metrics["weather/acc"] == pytest.approx(sum(right) / len(right))
    scores = [nats(tmp_path / "writer", "", text) for text in PROSE]
    num_bytes = sum(len(text.encode()) for text in PROSE)
    bits = -sum(score for score, _ in scores) / num_bytes / torch.log(torch.tensor(2.0)).item()
    assert metrics["prose/bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert metrics["weather/num_documents"] == 3
    assert 0 <= metrics["weather/acc_stderr"] < 1
    assert values["notes"][0] == "prose: version 2.0, 2 of 2 documents, 0 solved examples before each."

    record = read_run(Path(values["run_directory"]), tmp_path / "storage")
    assert record.state.status == "finished"
    assert record.evaluation is not None
    assert record.evaluation.metrics == metrics
    page = render(record)
    assert "weather/acc" in page
    assert "prose: version 2.0" in page
    assert (record.directory / "harness.log").is_file()

    assert main(["run", str(yaml), "exam"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"weather/acc +[01]\.\d{4}", shown)
    assert len(list(record.directory.parent.iterdir())) == 1, "the same question to the same version is the same run"


def test_each_choice_has_the_likelihood_that_transformers_gives_it(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from train_jobs.kinds.measuring.hushed import hushed
    from train_jobs.tasks.networks import load_language_model
    from train_jobs.tasks.spec import Checkpoint

    write_site(tmp_path, "{tasks: [boolq]}")
    pairs = [(question, f" {choice}") for question, choices, _ in QUESTIONS for choice in choices]
    with hushed(None):
        network = load_language_model(Checkpoint(directory=tmp_path / "writer", name="writer"))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "writer")
        model = HFLM(pretrained=network.eval(), backend="causal", tokenizer=tokenizer, batch_size=4)
        found = model.loglikelihood(
            [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
        )
    assert [score for score, _ in found] == pytest.approx([nats(tmp_path / "writer", *pair)[0] for pair in pairs])


def test_limits_few_shots_and_templates_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = site(tmp_path, "weather", ", limit: 2, num_fewshot: 1, chat_template: true")
    assert main(["run", str(yaml), "chat-exam", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["notes"] == ["weather: version 1.5, 2 of 3 documents, 1 solved examples before each."]
    assert main(["run", str(yaml), "exam"]) == 2
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "tasks", "more", "says"),
    [
        (
            "exam",
            "lost",
            "",
            r"the documents of lost cannot be read: FileNotFoundError: .*nowhere.jsonl.* `include` names",
        ),
        ("exam", "prose", ", num_fewshot: 3", "num_fewshot: 3, but prose is a task of 0 solved examples; remove"),
        ("sorted-exam", "prose", "", "of task classify; lm-eval measures models of task generate"),
    ],
)
def test_what_cannot_be_asked_is_explained(
    job: str, tasks: str, more: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = site(tmp_path, tasks, more)
    assert main(["run", str(yaml), job]) != 0
    assert re.search(says, capsys.readouterr().err.replace("\n", " "))
