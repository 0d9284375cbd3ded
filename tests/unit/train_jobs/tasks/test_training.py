"""Every task learns on a tiny model, and what it exports is what it trained, read by transformers alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from cluster.config.jobs_train import JobTask
from cluster.errors import PlanError
from cluster.runs.log import StepReport
from deployments.runtime.adapter import Adapter
from tests.support.tiny_task import EVALUATION, tiny_spec
from tests.support.tiny_tasks import ARCHITECTURE, LABELS, LENGTH, LORA, save_base, task_spec, write_task_data
from train_jobs.tasks.build import build_task
from train_jobs.tasks.spec import Architecture, Checkpoint, TaskSpec
from train_jobs.trainer.hooks import NoHooks, TrainResult
from train_jobs.trainer.loop import Trainer
from train_jobs.trainer.spec import Adam, CheckpointSpec, DurationSpec
from train_jobs.trainer.state import trained_weights
from train_jobs.trainer.world import World

FAST = Adam(kind="adamw", lr=3e-2, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)


class Losses(NoHooks):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.losses.append(report.loss)


def train(spec: TaskSpec, data: dict[str, Any], run_dir: Path, **changes: Any) -> tuple[list[float], TrainResult]:
    """Twelve steps; the losses, and the result."""
    hooks = Losses()
    trainer = Trainer(
        spec=tiny_spec(
            duration=DurationSpec(kind="steps", amount=12),
            evaluation=replace(EVALUATION, every_steps=None),
            checkpoint=CheckpointSpec(every_steps=1000, keep_last=1, keep_best=0),
            **changes,
        ),
        task=build_task(spec),
        shards=data["train"],
        evaluation_data=data["eval"],
        run_dir=run_dir,
        world=World.current(),
        hooks=hooks,
    )
    return hooks.losses, trainer.run()


def export(spec: TaskSpec, result: TrainResult, directory: Path) -> Path:
    build_task(spec).export(trained_weights(result.checkpoint, averaged=False), directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TaskSpec:
    return task_spec("lm", save_base(tmp_path_factory.mktemp("llama") / "base"))


def of(spec: TaskSpec, task: JobTask, **changes: Any) -> TaskSpec:
    """The same base for another task."""
    assert isinstance(spec.base, Checkpoint)
    return replace(task_spec(task, spec.base), **changes)


def published_loss(directory: Path, data: Any) -> float:
    """Mean loss over the evaluation data by plain transformers, each document on its own."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    batch = data.read(range(len(data)))
    total, count = 0.0, 0
    for ids, segments in zip(batch.token_ids_BS, batch.segments_BS, strict=True):
        for number in range(1, segments.max() + 1):
            document = torch.tensor(ids[segments == number])[None].long()
            with torch.no_grad():
                total += float(model(input_ids=document, labels=document).loss) * (document.shape[1] - 1)
            count += document.shape[1] - 1
    return total / count


@pytest.mark.parametrize("task", ["lm", "sft"])
def test_language_model_learns_and_is_published(task: JobTask, llama: TaskSpec, tmp_path: Path) -> None:
    spec, data = of(llama, task), write_task_data(tmp_path / "data", task)
    losses, result = train(spec, data, tmp_path / "run")
    assert losses[-1] < 0.7 * losses[0]
    directory = export(spec, result, tmp_path / "out")
    assert published_loss(directory, data["eval"]) == pytest.approx(result.metrics["loss"], rel=1e-5)
    assert result.metrics["bits_per_byte"] == pytest.approx(result.metrics["loss"] / 0.6931472 / 2, rel=1e-4)
    assert AutoTokenizer.from_pretrained(directory).encode("<|end|>") == [0]
    assert str(tmp_path) not in (directory / "config.json").read_text()


def test_language_model_from_scratch(llama: TaskSpec, tmp_path: Path) -> None:
    spec = replace(llama, base=Architecture(settings=ARCHITECTURE))
    data = write_task_data(tmp_path / "data", "lm")
    losses, result = train(spec, data, tmp_path / "run")
    assert losses[-1] < losses[0] - 0.1
    model = AutoModelForCausalLM.from_pretrained(export(spec, result, tmp_path / "out"))
    assert (model.config.model_type, model.config.vocab_size, model.config.eos_token_id) == ("llama", 258, 0)
    assert published_loss(tmp_path / "out", data["eval"]) == pytest.approx(result.metrics["loss"], rel=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_classifier_learns_and_is_published(model_type: str, tmp_path: Path) -> None:
    spec = task_spec("classify", save_base(tmp_path / "base", model_type))
    data = write_task_data(tmp_path / "data", "classify")
    losses, result = train(spec, data, tmp_path / "run")
    assert losses[-1] < 0.7 * losses[0]
    directory = export(spec, result, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {label: number for number, label in enumerate(LABELS)}
    batch = data["eval"].read(range(6))
    with torch.no_grad():
        logits_BC = model(
            input_ids=torch.tensor(batch.token_ids_BS).long(), attention_mask=torch.tensor(batch.segments_BS)
        ).logits
    loss = torch.nn.functional.cross_entropy(logits_BC, torch.tensor(batch.labels_B).long())
    assert float(loss) == pytest.approx(result.metrics["loss"], rel=1e-4)
    hits_B = logits_BC.argmax(1) == torch.tensor(batch.labels_B)
    assert float(hits_B.double().mean()) == pytest.approx(result.metrics["accuracy"])


def test_trained_classifier_goes_on_with_its_head_and_other_labels_get_a_new_one(tmp_path: Path) -> None:
    spec = task_spec("classify", save_base(tmp_path / "base", "bert"))
    data = write_task_data(tmp_path / "data", "classify")
    _, result = train(spec, data, tmp_path / "run")
    export(spec, result, tmp_path / "out")
    trained = Checkpoint(directory=tmp_path / "out", name="registry://trained@v1")
    same = build_task(task_spec("classify", trained)).build_model(tiny_spec())
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").classifier.weight
    assert torch.equal(same.network.classifier.weight, head)
    for labels in (("x", "y", "z"), ("x", "y")):
        other = build_task(task_spec("classify", trained, labels=labels)).build_model(tiny_spec())
        assert other.network.classifier.weight.shape[0] == len(labels)
        assert not torch.equal(other.network.classifier.weight, head[: len(labels)])


@pytest.mark.parametrize("adapter", [None, LORA])
def test_preferences_are_learned(adapter: Any, llama: TaskSpec, tmp_path: Path) -> None:
    spec, data = of(llama, "dpo", adapter=adapter), write_task_data(tmp_path / "data", "dpo")
    losses, result = train(spec, data, tmp_path / "run")
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)  # the model is its reference before the first step
    assert losses[-1] < 0.7 * losses[0]
    assert result.metrics["accuracy"] > 0.8
    assert result.metrics["margin"] > 0
    assert AutoModelForCausalLM.from_pretrained(export(spec, result, tmp_path / "out")) is not None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # read by peft itself
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_is_published_alone_or_merged(kind: Any, llama: TaskSpec, tmp_path: Path) -> None:
    lora = replace(LORA, kind=kind, dropout=0.1, publish="adapter")
    spec, data = of(llama, "sft", adapter=lora), write_task_data(tmp_path / "data", "sft")
    losses, result = train(spec, data, tmp_path / "run", optimizer=FAST)
    assert losses[-1] < 0.9 * losses[0]
    adapter = export(spec, result, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "registry://base@v1"
    assert (config["r"], config["use_dora"], config["peft_type"]) == (4, kind == "dora", "LORA")
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        assert all(name.startswith("base_model.model.model.layers.") for name in file.keys())  # noqa: SIM118
    base = AutoModelForCausalLM.from_pretrained(spec.base.directory)
    beside = PeftModel.from_pretrained(base, adapter)
    merged = export(of(llama, "sft", adapter=replace(lora, publish="merged")), result, tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(merged)
    ids_BS = torch.arange(10, 10 + LENGTH)[None]
    with torch.no_grad():
        logits_BSV = beside(input_ids=ids_BS).logits
        torch.testing.assert_close(logits_BSV, whole(input_ids=ids_BS).logits, rtol=1e-4, atol=1e-4)
    assert published_loss(merged, data["eval"]) == pytest.approx(result.metrics["loss"], rel=1e-4)
    served, name = Adapter(adapter), "model.layers.2.mlp.down_proj.weight"
    weight_NK = served.merged(name, AutoModelForCausalLM.from_pretrained(spec.base.directory).get_parameter(name))
    torch.testing.assert_close(weight_NK, whole.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_training_goes_on_from_an_adapter_over_its_base(llama: TaskSpec, tmp_path: Path) -> None:
    spec = of(llama, "sft", adapter=replace(LORA, publish="adapter"))
    model = build_task(spec).build_model(tiny_spec())
    torch.manual_seed(1)
    weights = {name: torch.randn_like(one) for name, one in model.named_parameters() if one.requires_grad}
    assert isinstance(spec.base, Checkpoint)
    base = Checkpoint(directory=tmp_path / "base", name="registry://adapted@v1")
    shutil.copytree(spec.base.directory, base.directory)  # as a registry lays an adapter's version out
    build_task(spec).export(weights, base.directory / "adapter")
    build_task(replace(spec, adapter=LORA)).export(weights, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    begun = build_task(of(llama, "sft", base=base)).build_model(tiny_spec()).network
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(begun.get_parameter(name), weight, rtol=1e-4, atol=1e-5)
    with pytest.raises(PlanError, match=r"registry://adapted@v1 is an adapter itself; set publish: merged"):
        build_task(replace(spec, base=base))


def test_classifier_with_an_adapter_trains_its_head_too(tmp_path: Path) -> None:
    spec = task_spec("classify", save_base(tmp_path / "base", "bert"), adapter=LORA)
    data = write_task_data(tmp_path / "data", "classify")
    losses, result = train(spec, data, tmp_path / "run", optimizer=FAST)
    assert losses[-1] < 0.9 * losses[0]
    model = AutoModelForSequenceClassification.from_pretrained(export(spec, result, tmp_path / "out")).eval()
    batch = data["eval"].read(range(6))
    with torch.no_grad():
        logits_BC = model(
            input_ids=torch.tensor(batch.token_ids_BS).long(), attention_mask=torch.tensor(batch.segments_BS)
        ).logits
    loss = torch.nn.functional.cross_entropy(logits_BC, torch.tensor(batch.labels_B).long())
    assert float(loss) == pytest.approx(result.metrics["loss"], rel=1e-4)
