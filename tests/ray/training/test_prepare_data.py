"""Preparation on Ray Data gives the bytes of preparation in one process, whatever the number of workers."""

from pathlib import Path

import pytest

from cluster.errors import DataError
from cluster.runs.files import prepared_directory
from tests.support.corpora import input_of, job, save_tokenizer
from train_jobs.data import chunking
from train_jobs.data.executors import InlineExecutor
from train_jobs.data.prepare import prepare
from train_jobs.data.ray_executor import RayDataExecutor
from train_jobs.data.spec import PrepareSpec, SplitSpec

pytestmark = pytest.mark.ray


def corpus(folder: Path, *, bad_line: int | None = None) -> PrepareSpec:
    folder.mkdir()
    for name in ("a", "b"):
        lines = [f"document {number} of {name}, number {number * 7919 % 1000}" for number in range(600)]
        if bad_line is not None and name == "b":
            lines[bad_line - 1] = "\udcff"
        (folder / f"{name}.txt").write_text("\n".join(lines), errors="surrogateescape")
    inputs = [input_of(folder / "a.txt", "lines"), input_of(folder / "b.txt", "lines", weight=2.0)]
    tokenizer = save_tokenizer(folder / "tokenizer")
    return job("lm", inputs, tokenizer, sequence_tokens=64, split=SplitSpec(eval_fraction=0.1, seed=0))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.mark.usefixtures("raylets")
def test_ray_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "CHUNK_BYTES", 4000)
    spec = corpus(tmp_path / "corpus")
    inline = prepare(spec, str(tmp_path / "inline"), InlineExecutor())
    expected = contents(prepared_directory(tmp_path / "inline", spec.name, inline.digest))
    assert inline.splits["train"].num_sequences > 100
    for workers in (1, 2):
        storage = str(tmp_path / f"ray-{workers}")
        manifest = prepare(spec, storage, RayDataExecutor(max_workers=workers, cpus_per_worker=0.5))
        assert contents(prepared_directory(Path(storage), spec.name, manifest.digest)) == expected


@pytest.mark.usefixtures("raylets")
def test_a_malformed_row_is_the_same_error(tmp_path: Path) -> None:
    spec = corpus(tmp_path / "corpus", bad_line=333)
    with pytest.raises(DataError, match=r"b\.txt:333: byte 0 \(0xFF\) is not utf-8"):
        prepare(spec, str(tmp_path / "storage"), RayDataExecutor(max_workers=2, cpus_per_worker=0.5))
    (tmp_path / "corpus" / "b.txt").rename(tmp_path / "corpus" / "b.txt.gz")
    source = f"path://{tmp_path}/corpus/b.txt.gz"
    broken = job("lm", [input_of(tmp_path, "lines", source=source)], spec.tokenizer)
    with pytest.raises(DataError, match=r"b\.txt\.gz cannot be read"):
        prepare(broken, str(tmp_path / "storage"), RayDataExecutor(max_workers=2, cpus_per_worker=0.5))
