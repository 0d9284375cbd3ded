"""What cannot work is refused before anything is loaded, and the message says what can."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.errors import PlanError
from tests.support.tiny_task import tiny_spec
from tests.support.tiny_tasks import ARCHITECTURE, LENGTH, LORA, save_base, task_spec
from train_jobs.tasks.build import build_task, outline_model
from train_jobs.tasks.combinations import check_combination
from train_jobs.tasks.language import LanguageModel, check_language_model
from train_jobs.tasks.spec import Architecture, Checkpoint, TaskSpec
from train_jobs.tasks.stages import cut_stages
from train_jobs.trainer.errors import CheckpointError
from train_jobs.trainer.task import PipelineTask


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TaskSpec:
    return task_spec("lm", save_base(tmp_path_factory.mktemp("base") / "llama"))


@pytest.mark.parametrize("task", ["classify", "dpo"])
def test_pipeline_takes_language_models_only(task: Any, spec: TaskSpec, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"pipeline with task {task}.*choose fsdp"):
        check_combination(task, "pipeline", None)
    for other in ("lm", "sft"):
        check_combination(other, "pipeline", LORA)
    for strategy in ("single", "ddp", "fsdp", "hsdp", "parameter_server"):
        check_combination(task, strategy, LORA)
    assert isinstance(build_task(spec), PipelineTask)
    assert not isinstance(build_task(task_spec(task, spec.base)), PipelineTask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "adapter.rank: 0; allowed: 1 or more"),
        ({"alpha": 0.0}, "adapter.alpha: 0.0; allowed: more than 0"),
        ({"dropout": 1.0}, "adapter.dropout: 1.0; allowed: 0 up to"),
        ({"targets": ()}, "adapter.targets: none"),
    ],
)
def test_adapters_have_limits(changes: dict[str, Any], message: str, spec: TaskSpec) -> None:
    with pytest.raises(PlanError, match=message):
        build_task(replace(spec, adapter=replace(LORA, **changes)))
    with pytest.raises(PlanError, match=message):
        check_combination("lm", "ddp", replace(LORA, **changes))


def test_adapter_of_a_classifier_is_published_merged(spec: TaskSpec) -> None:
    with pytest.raises(PlanError, match=r"adapter.publish: adapter with task classify.*merged"):
        check_combination("classify", "ddp", replace(LORA, publish="adapter"))


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("lm", {"labels": ("a", "b")}, "labels are for classify"),
        ("classify", {"labels": None}, "labels: none; a classifier needs two"),
        ("classify", {"labels": ("a",)}, "labels: only a; a classifier needs two"),
        ("classify", {"labels": ("a", "b", "a")}, "repeats one"),
        ("dpo", {"dpo_beta": None}, "task dpo: beta is None"),
        ("dpo", {"dpo_beta": 0.0}, "beta: 0.0; allowed: more than 0"),
        ("sft", {"dpo_beta": 0.1}, "task sft: beta is 0.1"),
        ("dpo", {"base": Architecture(settings=ARCHITECTURE)}, "starts from random weights; give base.source"),
        ("lm", {"base": Architecture(settings=ARCHITECTURE), "adapter": LORA}, "starts from random weights"),
        ("lm", {"vocab_size": 999}, "vocabulary has 258 tokens, the data's tokenizer 999"),
        ("lm", {"sequence_tokens": 1000}, "context is 256 tokens, the data's sequences have 1000"),
        ("lm", {"adapter": replace(LORA, targets=("q_proj", "gate"))}, "gate: no such matrix.*gate_proj, k_proj"),
        ("lm", {"adapter": replace(LORA, targets=("lm_head",))}, "lm_head: no such matrix"),
    ],
)
def test_specs_that_contradict_themselves(task: Any, changes: dict[str, Any], message: str, spec: TaskSpec) -> None:
    asked = replace(task_spec(task, spec.base), **changes)
    with pytest.raises(PlanError, match=message):
        outline_model(asked)


def test_position_that_an_encoder_keeps_for_padding_is_no_token_s(tmp_path: Path) -> None:
    base = save_base(tmp_path, "roberta", pad_token_id=1, max_position_embeddings=LENGTH + 2)
    asked = task_spec("classify", base)
    assert outline_model(asked).context_tokens == LENGTH
    network = build_task(asked).build_model(tiny_spec())
    network.network(input_ids=torch.full((1, LENGTH), 2))  # each of its tokens has a position
    with pytest.raises(PlanError, match=f"context is {LENGTH} tokens, the data's sequences have {LENGTH + 1}"):
        build_task(replace(asked, sequence_tokens=LENGTH + 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "lama"}, "model_type: 'lama'; allowed: a model type"),
        ({}, "model_type: None"),
        ({**ARCHITECTURE, "hiden_size": 3}, "llama has no hiden_size"),
        ({**ARCHITECTURE, "vocab_size": 3}, "vocab_size: the data's tokenizer decides it"),
        ({**ARCHITECTURE, "hidden_size": 30, "num_attention_heads": 7}, "transformers refuses it"),
        ({"model_type": "vit"}, "no causal language model of type vit"),
    ],
)
def test_architectures_that_are_none(settings: dict[str, Any], message: str, spec: TaskSpec) -> None:
    with pytest.raises(PlanError, match=message):
        outline_model(replace(spec, base=Architecture(settings=settings)))


def test_base_that_is_none_or_incomplete_or_quantized(spec: TaskSpec, tmp_path: Path) -> None:
    empty = Checkpoint(directory=tmp_path, name="registry://empty@v1")
    with pytest.raises(PlanError, match=r"base registry://empty@v1: .* has no config that transformers reads"):
        build_task(replace(spec, base=empty))
    assert isinstance(spec.base, Checkpoint)
    content = json.loads((spec.base.directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match="cannot be loaded"):
        build_task(replace(spec, base=empty)).build_model(tiny_spec())
    (tmp_path / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(PlanError, match="stored quantized"):
        build_task(replace(spec, base=empty))


def test_tokenizer_of_the_data_must_be_the_base_s_own(spec: TaskSpec, tmp_path: Path) -> None:
    content = json.loads((spec.tokenizer / "tokenizer.json").read_text())
    content["model"]["vocab"] = dict(zip(content["model"]["vocab"], range(257, -1, -1), strict=False))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match="not the one that the data were prepared with"):
        build_task(replace(spec, tokenizer=tmp_path))


def test_export_takes_the_weights_of_its_task_only(spec: TaskSpec, tmp_path: Path) -> None:
    task = build_task(spec)
    weights = {name: one.detach() for name, one in task.build_model(tiny_spec()).named_parameters()}
    missing = {name: weight for name, weight in weights.items() if name != "network.model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"lacks model.norm.weight"):
        task.export(missing, tmp_path / "out")
    with pytest.raises(CheckpointError, match="has more"):
        task.export(weights | {"network.more": weights["network.model.norm.weight"]}, tmp_path / "out")


def test_architecture_whose_documents_meet_is_refused() -> None:
    config = AutoConfig.for_model(
        "mamba", vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2
    )
    network = AutoModelForCausalLM.from_config(config)
    with pytest.raises(PlanError, match="mamba lets the documents of a packed sequence see each other"):
        check_language_model(LanguageModel(network))


def test_architectures_that_cannot_be_cut(spec: TaskSpec) -> None:
    model = build_task(spec).build_model(tiny_spec())
    assert isinstance(model, LanguageModel)
    with pytest.raises(PlanError, match="5 stages, but only 4 layers"):
        cut_stages(model, 5)
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=16, n_layer=2, n_head=2)
    with pytest.raises(PlanError, match="does not say how gpt2 is cut"):
        cut_stages(LanguageModel(AutoModelForCausalLM.from_config(config)), 2)
