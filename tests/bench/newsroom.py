"""``python -m tests.bench newsroom CONFIG JOB``: a trained classifier beside TF-IDF and a linear model, on one split.

JOB is a train job of task classify (or its prepare job: then the baseline alone). The baseline reads the documents of
the run in the same split: whole ones, and cut to the tokens that the model sees. TF-IDF is over words and pairs of
words, the linear model is a logistic regression whose C is chosen on the training documents by cross-validation.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import accuracy_score, f1_score
from tokenizers import Tokenizer

from cluster.config.load import load_config
from cluster.config.schema import ClusterConfig
from cluster.plan.jobs import plan_data, plan_job
from cluster.registry.progress import no_progress
from cluster.registry.store import Registry
from cluster.runs.files import newest_run, prepared_directory, storage_directory
from cluster.runs.prepared import BadRow, Manifest
from cluster.runs.record import read_run
from train_jobs.data.chunking import cut
from train_jobs.data.cleaning import Example, Malformed, make_example
from train_jobs.data.fetching import fetch
from train_jobs.data.prepare import find_current
from train_jobs.data.reading import read_chunk
from train_jobs.data.shards import Shards
from train_jobs.data.spec import PrepareSpec
from train_jobs.data.splitting import content_hash, split_of
from train_jobs.job import read_prepare


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents of one split, and the label of each."""

    texts: list[str]
    labels: list[str]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the table."""

    name: str
    accuracy: float
    macro_f1: float
    fit_s: float | None = None


def whole_documents(spec: PrepareSpec, manifest: Manifest, storage: str) -> dict[str, Texts]:
    """Every document as it was before it was tokenized, by split; raises when they are not those of the manifest."""
    found: dict[str, Texts] = {split: Texts(texts=[], labels=[]) for split in manifest.splits}
    seen: set[bytes] = set()
    for example in _examples(spec, storage):
        content = content_hash(*example.identity)
        if spec.clean.deduplicate and content in seen:
            continue
        seen.add(content)
        split = found[split_of(content_hash(*example.split_identity), spec.split)]
        split.texts.append(example.text)
        split.labels.append(str(example.label))
    for name, texts in found.items():
        counted = dict(zip(*np.unique(texts.labels, return_counts=True), strict=True)) if texts.labels else {}
        if counted != manifest.splits[name].label_counts:
            raise RuntimeError(f"{name}: these are not the documents of the prepared data: {counted}")
    return found


def _examples(spec: PrepareSpec, storage: str) -> Iterator[Example]:
    labels = None if spec.labels is None else frozenset(spec.labels)
    downloads = Registry(storage).cache / "downloads"
    with tempfile.TemporaryDirectory() as work:
        for number, source in enumerate(spec.inputs):
            place = Path(work) / str(number)
            place.mkdir()
            found = fetch(source, downloads=downloads, work=place, progress=no_progress)
            for chunk in cut(found, source, spec.task, source=number, first_number=0):
                for row in read_chunk(chunk):
                    if isinstance(row, BadRow):
                        continue
                    try:
                        example = make_example(spec.task, row.values, spec.clean, labels)
                    except Malformed:
                        continue
                    if example.num_chars >= spec.clean.min_chars:
                        yield example


def cut_documents(directory: Path, manifest: Manifest) -> dict[str, Texts]:
    """The text that is left of each document in the shards, by split."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    found = {}
    for split in manifest.splits:
        shards = Shards.open(directory, split)
        batch = shards.read(np.arange(len(shards)))
        assert batch.labels_B is not None, "data for classify have labels"
        assert manifest.labels is not None, "data for classify have labels"
        rows = zip(batch.token_ids_BS, batch.segments_BS, strict=True)
        texts = tokenizer.decode_batch([ids[segments > 0].tolist() for ids, segments in rows])
        found[split] = Texts(texts=texts, labels=[manifest.labels[number] for number in batch.labels_B])
    return found


def baseline(name: str, splits: dict[str, Texts]) -> Score:
    """Accuracy and macro-F1 on the split eval of a model that saw the split train."""
    began = time.perf_counter()
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    model = LogisticRegressionCV(
        Cs=(1.0, 10.0, 100.0), cv=5, scoring="accuracy", max_iter=1000, l1_ratios=(0.0,), use_legacy_attributes=False
    )
    model.fit(vectorizer.fit_transform(splits["train"].texts), splits["train"].labels)
    predicted = model.predict(vectorizer.transform(splits["eval"].texts))
    return Score(
        name=name,
        accuracy=float(accuracy_score(splits["eval"].labels, predicted)),
        macro_f1=float(f1_score(splits["eval"].labels, predicted, average="macro")),
        fit_s=time.perf_counter() - began,
    )


def trained(config: ClusterConfig, job: str) -> Score:
    """What the newest run of the job reached; raises when it has not been evaluated."""
    storage = Path(config.storage_root)
    record = read_run(newest_run(storage, job), storage)
    if record.evaluation is None:
        raise SystemExit(f"run {record.state.run_id} of {job} has not been evaluated yet")
    metrics = record.evaluation.metrics
    name = f"{record.state.published or record.state.run_id}, step {record.evaluation.step}"
    return Score(name=name, accuracy=metrics["accuracy"], macro_f1=metrics["macro_f1"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    config = load_config(args.config)
    plan = plan_job(config, args.job)
    if plan.task != "classify":
        raise SystemExit(f"{args.job} is a job of task {plan.task}; this compares classifiers")
    prepare = plan_data(config, plan)
    spec = read_prepare(prepare)
    manifest = find_current(spec, config.storage_root)
    if manifest is None:
        raise SystemExit(f"{prepare.name} are not prepared yet; run {prepare.name} or {args.job} first")
    directory = prepared_directory(storage_directory(config.storage_root), prepare.name, manifest.digest)
    scores = [
        baseline("TF-IDF + linear, whole documents", whole_documents(spec, manifest, config.storage_root)),
        baseline(f"TF-IDF + linear, {manifest.sequence_tokens} tokens", cut_documents(directory, manifest)),
    ]
    if plan.kind == "train":
        scores.append(trained(config, args.job))
    _print(scores, manifest, as_json=args.json)


def _print(scores: list[Score], manifest: Manifest, *, as_json: bool) -> None:
    counts = {name: split.num_documents for name, split in manifest.splits.items()}
    if as_json:
        print(json.dumps({"documents": counts, "scores": [vars(score) for score in scores]}, indent=2))
        return
    said = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    table = Table("", "accuracy", "macro-F1", "fit", title=f"data {manifest.name} ({said} documents)")
    for score in scores:
        fit = "" if score.fit_s is None else f"{score.fit_s:.1f} s"
        table.add_row(score.name, f"{score.accuracy:.4f}", f"{score.macro_f1:.4f}", fit)
    Console().print(table)


if __name__ == "__main__":
    main()
