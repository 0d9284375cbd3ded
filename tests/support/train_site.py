"""A config with a prepare job and a train job on it, a corpus and tiny bases, for tests of jobs without a cluster."""

from pathlib import Path

import yaml as yaml_module

from tests.support.corpora import write_days
from tests.support.tiny_tasks import save_base
from train_jobs.__main__ import main

Values = dict[str, object]


class Site:
    """A storage, tiny models and a corpus of 120 labelled documents below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "jobs.yaml"
        save_base(folder / "llama")
        save_base(folder / "bert", "bert")
        write_days(folder / "rows", ("calm", "rain", "storm"), num_documents=120)
        (folder / "text").mkdir()
        (folder / "text" / "all.txt").write_text("\n\n".join(f"A day, number {number}." for number in range(400)))

    def write(self, *, memory: str = "8GiB", slots: int = 2, data: Values | None = None, **job: object) -> None:
        task = str(job.get("task", "lm"))
        rows = {"source": f"path://{self.folder}/rows", "format": "folders"}
        text = {"source": f"path://{self.folder}/text", "format": "lines"}
        base = "bert" if task == "classify" else "llama"
        prepare: Values = {
            "name": "days",
            "kind": "prepare",
            "task": task,
            "inputs": [rows if task == "classify" else text],
            "tokenizer": f"path://{self.folder}/{base}",
            "sequence_tokens": 32,
        }
        train: Values = {
            "name": "forecast",
            "kind": "train",
            "task": task,
            "base": {"source": f"path://{self.folder}/{base}"},
            "data": "days",
            "batch": {"sequences": 8, "micro_sequences": 4},
            "duration": {"epochs": 2},
            "optimizer": {"kind": "adamw", "lr": 1e-3},
        }
        content = {
            "name": "weather",
            "storage": f"{self.folder}/storage",
            "cluster": {"nodes": [{"name": "box", "resources": {"CPU": 2, "memory": memory, "train_slot": slots}}]},
            "jobs": [prepare | (data or {}), train | job],
        }
        self.path.write_text(yaml_module.safe_dump(content))

    def prepare(self) -> None:
        assert main(["run", str(self.path), "days"]) == 0
