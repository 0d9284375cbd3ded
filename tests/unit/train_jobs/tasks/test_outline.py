"""A model's outline is that of the model that is built."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_task import tiny_spec
from tests.support.tiny_tasks import ARCHITECTURE, LORA, save_base, task_spec
from train_jobs.tasks.build import build_task, outline_model
from train_jobs.tasks.spec import Architecture
from train_jobs.tasks.stages import cut_stages


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("lm", {}),
        ("lm", {"base": Architecture(settings=ARCHITECTURE)}),
        ("sft", {"adapter": LORA}),
        ("classify", {}),
        ("classify", {"adapter": LORA}),
        ("dpo", {}),
    ],
)
def test_outline_counts_what_is_built(task: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    spec = replace(task_spec(task, save_base(tmp_path / "base")), **changes)
    outline = outline_model(spec)
    model = build_task(spec).build_model(tiny_spec())
    assert outline.num_parameters == sum(one.numel() for one in model.parameters())
    assert outline.num_trained_parameters == sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert (outline.model_type, outline.num_layers, outline.hidden_size) == ("llama", 4, 32)
    assert outline.vocab_size == 258


def test_same_seed_same_model(tmp_path: Path) -> None:
    spec = task_spec("classify", save_base(tmp_path / "base", "bert"), adapter=LORA)
    one, other = (build_task(spec).build_model(tiny_spec()).state_dict() for _ in range(2))
    assert all(one[name].equal(other[name]) for name in one)
    different = build_task(spec).build_model(tiny_spec(seed=8)).state_dict()
    assert not different["network.classifier.original_module.weight"].equal(
        one["network.classifier.original_module.weight"]
    )


def test_stages_hold_every_parameter_once_under_its_name(tmp_path: Path) -> None:
    spec = task_spec("sft", save_base(tmp_path / "base"), adapter=LORA)  # tied, which may be cut as it is frozen
    model = build_task(spec).build_model(tiny_spec())
    parts = cut_stages(model, 3)
    trained = [name for part in parts for name, one in part.named_parameters() if one.requires_grad]
    assert sorted(trained) == sorted(name for name, one in model.named_parameters() if one.requires_grad)
    layers = [
        len({name.split(".")[3] for name, _ in part.named_parameters() if ".layers." in name}) for part in parts
    ]
    assert layers == [1, 1, 2]
    owners = [id(one) for part in parts for one in part.parameters()]
    assert len(owners) == len(set(owners))
