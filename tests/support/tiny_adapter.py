"""LoRA adapters of a few kilobytes, written as peft writes them, and what they come to when merged by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 8,
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "target_modules": ["q_proj", "down_proj"],
}


def write_adapter(
    directory: Path,
    base: Path,
    *,
    seed: int = 0,
    targets: Sequence[str] = ("q_proj", "v_proj", "down_proj"),
    dora: bool = False,
    rank: int = 2,
    **config: Any,
) -> Path:
    """A random adapter of the model in ``base``, which must be one file; wide enough to change what it says."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in targets:
            continue
        prefix = f"base_model.model.{module}"
        num_rows, num_columns = weight.shape
        tensors[f"{prefix}.lora_A.weight"] = random.normal(0, 0.3, (rank, num_columns)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = random.normal(0, 0.3, (num_rows, rank)).astype(np.float32)
        if dora:
            tensors[f"{prefix}.lora_magnitude_vector"] = random.uniform(0.5, 2, num_rows).astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    content = CONFIG | {"r": rank, "use_dora": dora, "target_modules": list(targets)} | config
    (directory / "adapter_config.json").write_text(json.dumps(content))
    return directory


def merge_by_hand(target: Path, base: Path, adapter: Path) -> Path:
    """A whole checkpoint with the adapter's arithmetic done in float64."""
    target.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors, changes = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    for name, low in changes.items():
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if not name.endswith(".lora_A.weight"):
            continue
        prefix = name.removesuffix(".lora_A.weight")
        weight = tensors[f"{module}.weight"].astype(np.float64)
        weight += scale * changes[f"{prefix}.lora_B.weight"].astype(np.float64) @ low.astype(np.float64)
        if config["use_dora"]:
            length = np.linalg.norm(weight, axis=1, keepdims=True)
            weight *= changes[f"{prefix}.lora_magnitude_vector"][:, None] / length
        tensors[f"{module}.weight"] = weight.astype(np.float32)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
