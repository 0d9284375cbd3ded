"""Screening: only safetensors and text are taken; pickles and code are refused or left behind, by name."""

import json
import struct
from pathlib import Path

import pytest

from cluster.errors import SourceError
from cluster.registry.sources.screen import screen
from tests.support.tiny_checkpoint import write_checkpoint


def test_plain_checkpoint_is_taken_whole(tmp_path: Path) -> None:
    screened = screen(write_checkpoint(tmp_path / "m"))
    assert screened.taken == ("config.json", "model.safetensors", "tokenizer_config.json")
    assert (screened.left_out, screened.dtypes) == ((), {"F32"})
    assert screened.config["model_type"] == "llama"


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", "last.ckpt", "tf_model.h5", "flax_model.msgpack"],
)
def test_pickles_alone_are_refused_by_name(tmp_path: Path, name: str) -> None:
    directory = write_checkpoint(tmp_path / "m")
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(SourceError, match=rf"only in pickle files \({name}\).*refused; convert them to safetensors"):
        screen(directory)


def test_pickles_and_code_beside_safetensors_stay_behind(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m")
    extra = ["pytorch_model.bin", "modeling_mine.py", "training_args.bin", "onnx/model.onnx", "run.sh"]
    for name in extra:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"x")
    screened = screen(directory)
    assert sorted(screened.left_out) == sorted(extra)
    assert not set(extra) & set(screened.taken)


def test_sentence_transformers_layout_is_kept(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m")
    for name in ("1_Pooling/config.json", "modules.json", "sentence_bert_config.json", "vocab.txt", "LICENSE"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")
    assert {"1_Pooling/config.json", "modules.json", "vocab.txt", "LICENSE"} <= set(screen(directory).taken)


def test_second_copy_of_the_weights_stays_behind(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", shards=2)
    (directory / "consolidated.safetensors").write_bytes(
        (directory / "model-00001-of-00002.safetensors").read_bytes()
    )
    screened = screen(directory)
    assert screened.left_out == ("consolidated.safetensors",)
    assert "model-00002-of-00002.safetensors" in screened.taken


def test_missing_shard_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SourceError, match=r"index.json lists model-00002-of-00003.safetensors, but"):
        screen(directory)


def test_directory_without_weights_or_config(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"has no .safetensors file; it has nothing"):
        screen(tmp_path / "empty")
    directory = write_checkpoint(tmp_path / "m")
    (directory / "config.json").unlink()
    with pytest.raises(SourceError, match=r"has no config.json"):
        screen(directory)


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"model_type": "llama"}'])
def test_config_must_name_the_architecture(tmp_path: Path, text: str) -> None:
    directory = write_checkpoint(tmp_path / "m")
    (directory / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config.json: (not JSON|needs 'model_type' and 'architectures')"):
        screen(directory)


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", b"\x80\x04pickle bytes here", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]"],
)
def test_weights_must_be_safetensors_inside_too(tmp_path: Path, content: bytes) -> None:
    directory = write_checkpoint(tmp_path / "m")
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=r"model.safetensors: not a safetensors file"):
        screen(directory)


def test_integer_tensors_are_no_dtype(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m")
    header = json.dumps({"position_ids": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (directory / "extra").mkdir()
    (directory / "extra" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert screen(directory).dtypes == {"F32"}
