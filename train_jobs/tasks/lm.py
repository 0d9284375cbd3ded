"""lm and sft: packed sequences in, the cross entropy of their targets out.

The data say what a target is: every token of a text, or an assistant's turns.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from train_jobs.data.shards import Shards
from train_jobs.evaluation.text import TextSums
from train_jobs.tasks.evaluating import device_of, sum_over_workers, to_tensor
from train_jobs.tasks.export import export_network
from train_jobs.tasks.language import LanguageModel, check_language_model
from train_jobs.tasks.networks import make_network
from train_jobs.tasks.spec import TaskSpec
from train_jobs.tasks.stages import cut_stages
from train_jobs.trainer.spec import TrainSpec
from train_jobs.trainer.task import LossParts, MicroBatch


class LanguageTask:
    """Next-token prediction on the targets of the data."""

    def __init__(self, spec: TaskSpec) -> None:
        self._spec = spec
        self._checked = False

    def build_model(self, spec: TrainSpec) -> nn.Module:
        """See Task; the first one built is compared with transformers' own forward pass."""
        model = LanguageModel(make_network(self._spec, spec.seed).module)
        if not self._checked:
            check_language_model(model)
            self._checked = True
        return model

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> LossParts:
        """See Task."""
        nats_N, _ = model(micro_batch["token_ids_BS"], micro_batch["segments_BS"], micro_batch["loss_mask_BS"])
        return LossParts(sum=nats_N.sum(), count=torch.tensor(float(len(nats_N)), device=nats_N.device))

    def evaluate(self, model: nn.Module, data: Shards) -> Mapping[str, Any]:
        """Metrics of ``TextSums``: loss, perplexity, bits_per_byte, token_accuracy."""
        device = device_of(model)

        def score(items: NDArray[np.int64]) -> TextSums:
            batch = data.read(items)
            nats_N, correct_N = model(
                to_tensor(batch.token_ids_BS, torch.int64, device),
                to_tensor(batch.segments_BS, torch.int32, device),
                to_tensor(batch.loss_mask_BS, torch.bool, device),
            )
            return TextSums.of(nats_N.cpu().numpy(), correct_N.cpu().numpy(), num_bytes=int(batch.num_bytes_B.sum()))

        return sum_over_workers(len(data), self._spec.evaluation_sequences, TextSums(), score).metrics()

    def export(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        """See Task."""
        export_network(self._spec, weights, directory)

    def pipeline_parts(self, model: nn.Module, num_stages: int) -> Sequence[nn.Module]:
        """See PipelineTask."""
        assert isinstance(model, LanguageModel)
        return cut_stages(model, num_stages)

    def pipeline_inputs(self, micro_batch: MicroBatch) -> Mapping[str, torch.Tensor]:
        """See PipelineTask."""
        return {
            "segments_BS": micro_batch["segments_BS"],
            "target_ids_BS": micro_batch["token_ids_BS"],
            "loss_mask_BS": micro_batch["loss_mask_BS"],
        }

    def pipeline_loss(self, output: torch.Tensor, micro_batch: MicroBatch) -> LossParts:
        """See PipelineTask; the last stage gives the loss of every position."""
        return LossParts(sum=output.sum(), count=micro_batch["loss_mask_BS"][:, 1:].sum().float())
