"""The loss of dpo is its closed form over log-probabilities that transformers itself computes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.tiny_task import tiny_spec
from tests.support.tiny_tasks import LORA, save_base, task_spec, write_task_data
from train_jobs.tasks.adapter import BaseSwitch
from train_jobs.tasks.build import build_task
from train_jobs.trainer.task import MicroBatch


def answer_logprob(network: Any, ids: Any, segments: Any) -> float:
    document = torch.tensor(ids[segments == 1])[None].long()
    logprobs = torch.log_softmax(network(input_ids=document).logits[0, :-1].double(), dim=-1)
    return float(logprobs.gather(1, document[0, 1:, None]).sum())


@pytest.mark.parametrize("adapter", [None, replace(LORA, dropout=0.5)])
def test_loss_is_the_closed_form(adapter: Any, tmp_path: Path) -> None:
    spec = task_spec("dpo", save_base(tmp_path / "base"), adapter=adapter, dpo_beta=0.3)
    sides = write_task_data(tmp_path / "data", "dpo")["train"]
    task = build_task(spec)
    model = task.build_model(tiny_spec()).train(adapter is None)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # so that the model is no longer its reference
                parameter.add_(0.05 * torch.randn_like(parameter))
                assert not name.startswith("reference.")
    batches = {side: sides[side].read(range(3)) for side in sides}
    arrays = {
        f"{side}_{name}": torch.from_numpy(getattr(batch, name)).to(dtype)
        for side, batch in batches.items()
        for name, dtype in [("token_ids_BS", torch.int64), ("segments_BS", torch.int32), ("loss_mask_BS", torch.bool)]
    }
    parts = task.loss(model, MicroBatch(step=0, number=0, sequence_ids=(0, 1, 2), fields=arrays))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    expected = 0.0
    with torch.no_grad():
        for row in range(3):
            gains = [
                answer_logprob(model.network.eval(), batch.token_ids_BS[row], batch.segments_BS[row])
                - answer_logprob(reference, batch.token_ids_BS[row], batch.segments_BS[row])
                for batch in (batches["chosen"], batches["rejected"])
            ]
            expected += math.log1p(math.exp(-0.3 * (gains[0] - gains[1])))
    assert float(parts.count) == 3
    assert parts.sum.item() == pytest.approx(expected, rel=1e-4)
    parts.sum.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_base_switch_leaves_additions_and_dropout_out_and_comes_back(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = build_task(task_spec("sft", base, adapter=replace(LORA, dropout=0.5))).build_model(tiny_spec()).train()
    network = model.network
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    plain = AutoModelForCausalLM.from_pretrained(base.directory)
    ids_BS = torch.arange(3, 13)[None]
    switch, trained = BaseSwitch(network), [one.requires_grad for one in network.parameters()]
    with torch.no_grad():
        with switch.on():
            torch.testing.assert_close(network(input_ids=ids_BS).logits, plain(input_ids=ids_BS).logits)
        assert not torch.allclose(network(input_ids=ids_BS).logits, plain(input_ids=ids_BS).logits)
        assert not torch.equal(network(input_ids=ids_BS).logits, network(input_ids=ids_BS).logits)
    assert all(module.training for module in network.modules())
    assert [one.requires_grad for one in network.parameters()] == trained
