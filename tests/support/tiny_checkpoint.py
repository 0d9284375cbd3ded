"""Checkpoints of a few kilobytes, written without torch: a Llama's safetensors and config, and wheels of them."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of a two-layer Llama in float32, by transformers' names."""
    generator = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,), "lm_head.weight": (32, 8)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.input_layernorm.weight": (8,), f"{prefix}.post_attention_layernorm.weight": (8,)}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (8, 8) for name in ("q", "o")}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (4, 8) for name in ("k", "v")}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (16, 8) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (8, 16)}
    return {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_checkpoint(directory: Path, *, seed: int = 0, shards: int = 1, **config: object) -> Path:
    """A directory as ``save_pretrained`` leaves it, in one file or several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    tensors = llama_tensors(seed)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for index in range(shards):
        part = {name: tensor for number, (name, tensor) in enumerate(tensors.items()) if number % shards == index}
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    index_content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_content))
    return directory


def write_wheel(folder: Path, package: str, version: str, files: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, with ``files`` at its root."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{package.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\nLicense: MIT\n"
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in (files | {f"{info}/METADATA": metadata.encode(), f"{info}/WHEEL": tag.encode()}).items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
