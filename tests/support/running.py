"""A cluster of its own for tests: tiny models behind the real command, on free ports, nothing left afterwards."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.control.ports import is_free
from tests.support.native_slices import reason_against_native
from tests.support.tiny_models import save_tiny_classifier, save_tiny_model
from tests.support.tiny_tokenizer import byte_level_tokenizer, wordpiece_tokenizer

UP_TIMEOUT_S = 240


_PORTS = range(20_000, 32_000)
"""Below those that the system gives out itself: Ray takes many of them before the gateway opens its own."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, and that nobody will be given by chance."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().choice(_PORTS)
        if port not in found and is_free(port):
            found.append(port)
    return found


def save_tiny_chat(directory: Path, **overrides: Any) -> None:
    """A tiny Llama that the native kernels can compute, with a byte-level tokenizer and a chat template."""
    save_tiny_model(directory, "llama", **({"head_dim": 16, "eos_token_id": 0, "pad_token_id": 1} | overrides))
    byte_level_tokenizer().save_pretrained(directory)


def save_tiny_sorter(directory: Path, labels: tuple[str, ...]) -> None:
    """A tiny BERT classifier with a WordPiece tokenizer."""
    tokenizer = wordpiece_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 3}
    save_tiny_classifier(directory, "bert", labels, **sizes)
    tokenizer.save_pretrained(directory)


def save_tiny_encoder(directory: Path) -> None:
    """A tiny BERT with a WordPiece tokenizer, mean pooling by default."""
    import torch
    from transformers import AutoModel, BertConfig

    torch.manual_seed(0)
    tokenizer = wordpiece_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=3,
    )
    AutoModel.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


TORCH = {"dtype": "float32", "kernels": "torch"}
NATIVE = {"dtype": "bfloat16", "kernels": "native"}


def exact_kernels() -> dict[str, str]:
    """Of those that give equal requests equal text: native, whose stages start without transformers, or torch."""
    return TORCH if reason_against_native() else NATIVE


def chat_model(path: str, **changes: Any) -> dict[str, Any]:
    """The YAML entry of the tiny chat model, on the kernels that start fastest."""
    return {
        "name": "tiny",
        "source": f"path://{path}",
        "task": "generate",
        **exact_kernels(),
        "context_tokens": 256,
        "pipeline": {"stages": 2, "split": [3, 1], "threads": 1},
        "replicas": {"min": 1, "max": 1},
    } | changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """One config of one running cluster, driven by the command line."""

    config: Path
    storage: Path
    temp_dir: Path
    http_port: int

    @property
    def url(self) -> str:
        """Base URL of the gateway."""
        return f"http://127.0.0.1:{self.http_port}"

    def manta(self, *words: str, timeout_s: float = UP_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Run ``manta WORDS`` as a person would; the caller looks at the exit status."""
        return subprocess.run(
            [sys.executable, "-m", "cluster", *words], capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def up(self) -> str:
        """``manta up``; returns what it printed, fails with it when it failed."""
        done = self.manta("up", str(self.config))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def down(self) -> None:
        """``manta down``, and nothing may be left."""
        done = self.manta("down", str(self.config))
        assert done.returncode == 0, done.stdout + done.stderr
        assert not self.leftovers(), self.leftovers()
        shutil.rmtree(self.temp_dir, ignore_errors=True)

    def status(self) -> dict[str, Any]:
        """``manta status --json``."""
        done = self.manta("status", str(self.config), "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def leftovers(self) -> list[str]:
        """Processes that still have a file open under this cluster's directories."""
        found = []
        for process in psutil.process_iter(["pid", "name"]):
            try:
                files = [file.path for file in process.open_files()]
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if any(path.startswith((f"{self.temp_dir}/", f"{self.storage}/")) for path in files):
                found.append(f"{process.pid} {process.name()}")
        return found

    def edit(self, change: Any) -> None:
        """Rewrite the config: ``change`` gets the parsed YAML and alters it."""
        values = yaml.safe_load(self.config.read_text())
        change(values)
        self.config.write_text(yaml.safe_dump(values, sort_keys=False))


def write_cluster(directory: Path, name: str, models: list[dict[str, Any]], **gateway: Any) -> Cluster:
    """A config for ``models`` under ``directory``; the temp dir is short because socket paths are limited."""
    ray_port, dashboard_port, http_port = free_ports(3)
    temp_dir = Path(f"/tmp/manta-test-{ray_port}")
    values = {
        "name": name,
        "storage": str(directory / "storage"),
        "cluster": {
            "provider": {
                "kind": "local",
                "ray_port": ray_port,
                "dashboard_port": dashboard_port,
                "temp_dir": str(temp_dir),
                "object_store": "100MiB",
            },
            "nodes": [{"name": "box", "resources": {"CPU": 4}, "min": 1, "max": 1}],
        },
        "gateway": {"http": {"host": "127.0.0.1", "port": http_port}, **gateway},
        "models": models,
    }
    config = directory / "cluster.yaml"
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    return Cluster(config=config, storage=directory / "storage", temp_dir=temp_dir, http_port=http_port)
