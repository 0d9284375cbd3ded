"""A GGUF file, written here with the gguf package, becomes a version that plain transformers loads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.errors import SourceError
from cluster.registry.materialize import materialize
from cluster.registry.progress import no_progress
from cluster.registry.sources import convert as conversion
from cluster.registry.sources.importer import import_source
from cluster.registry.store import Registry

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 32, 4, 2, 64, 2


def _byte_tokens() -> list[str]:
    """GPT-2's spelling of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in plain]
    spelling = {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(moved)}
    return [spelling[byte] for byte in range(256)]


def _write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A random Llama, its matrices in Q8_0 and its norms in float32; returns the embedding and the norm as stored."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_byte_tokens(), "he", "ll"]
    writer = GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 258)
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    tensors = _tensors(len(tokens))
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(
                name, quants.quantize(tensor, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    packed = quants.quantize(tensors["token_embd.weight"], GGMLQuantizationType.Q8_0)
    return {
        "model.embed_tokens.weight": quants.dequantize(packed, GGMLQuantizationType.Q8_0),
        "model.norm.weight": tensors["output_norm.weight"],
    }


def _tensors(num_tokens: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd.weight": (num_tokens, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"blk.{layer}"
        shapes |= {f"{prefix}.attn_norm.weight": (HIDDEN,), f"{prefix}.ffn_norm.weight": (HIDDEN,)}
        shapes |= {f"{prefix}.attn_{name}.weight": (HIDDEN, HIDDEN) for name in ("q", "output")}
        shapes |= {f"{prefix}.attn_{name}.weight": (kv, HIDDEN) for name in ("k", "v")}
        shapes |= {f"{prefix}.ffn_{name}.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{prefix}.ffn_down.weight": (HIDDEN, INNER)}
    return {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def test_gguf_becomes_a_version_that_transformers_loads(tmp_path: Path) -> None:
    stored = _write_gguf(tmp_path / "tiny.gguf")
    registry = Registry(str(tmp_path / "storage"))
    labels: list[str] = []
    version = import_source(
        registry,
        "tiny",
        f"path://{tmp_path / 'tiny.gguf'}",
        task="generate",
        dtype="bfloat16",
        progress=lambda label, done, total, unit: labels.append(label),
    )
    assert (version.license, version.chat_template, version.model_type) == ("apache-2.0", True, "llama")
    assert {"writing safetensors", "hashing", "storing"} <= set(labels)
    directory = materialize(registry, version)

    tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer_config["model_max_length"] == 128
    assert not {"is_local", "local_files_only", "backend"} & set(tokenizer_config)
    assert "_from_model_config" not in json.loads((directory / "generation_config.json").read_text())
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    state = model.state_dict()
    for name, expected in stored.items():
        assert torch.equal(state[name], torch.tensor(expected).to(torch.bfloat16)), name
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nhello<|im_end|>\n"
    assert tokenizer.decode(tokenizer("hello caf\u00e9")["input_ids"]) == "hello caf\u00e9"
    assert tokenizer("<|im_end|>")["input_ids"] == [2]


def test_converter_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "CONVERTER", "deployments.runtime.absent")
    with pytest.raises(SourceError, match=r"(?s)x.gguf could not be converted \(exit status 1\):.*No module named"):
        conversion.convert(
            tmp_path / "x.gguf", tmp_path / "out", task="generate", dtype="float32", progress=no_progress
        )
