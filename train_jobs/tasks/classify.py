"""classify: one document per sequence in, the cross entropy of its label out.

The network is transformers' own sequence classification model, and so is its pooling: the first token for encoders
of BERT's kind, the last real token for decoders, and what the config says where the class can do more.
Dimensions: B sequences, S positions, C labels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from train_jobs.data.shards import Shards
from train_jobs.evaluation.classes import ClassSums
from train_jobs.evaluation.labels import label_numbers
from train_jobs.tasks.evaluating import device_of, sum_over_workers, to_tensor
from train_jobs.tasks.export import export_network
from train_jobs.tasks.networks import make_network
from train_jobs.tasks.packing import longest_tokens
from train_jobs.tasks.spec import TaskSpec
from train_jobs.trainer.spec import TrainSpec
from train_jobs.trainer.task import LossParts, MicroBatch


class Classifier(nn.Module):
    """Leaves out the positions that are padding in all sequences of a batch."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, token_ids_BS: torch.Tensor, segments_BS: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        stop = longest_tokens(segments_BS)
        mask_BS = (segments_BS[:, :stop] != 0).long()
        logits_BC: torch.Tensor = self.network(input_ids=token_ids_BS[:, :stop], attention_mask=mask_BS).logits
        return logits_BC


class ClassifyTask:
    """Labels of documents."""

    def __init__(self, spec: TaskSpec) -> None:
        assert spec.labels is not None, "check_task has refused it"
        self._spec = spec
        self._labels = spec.labels

    def build_model(self, spec: TrainSpec) -> nn.Module:
        """See Task."""
        return Classifier(make_network(self._spec, spec.seed).module)

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> LossParts:
        """See Task."""
        logits_BC = model(micro_batch["token_ids_BS"], micro_batch["segments_BS"])
        total = cross_entropy(logits_BC.float(), micro_batch["labels_B"], reduction="sum")
        return LossParts(sum=total, count=torch.tensor(float(len(logits_BC)), device=total.device))

    def evaluate(self, model: nn.Module, data: Shards) -> Mapping[str, Any]:
        """Metrics of ``ClassSums``: loss, accuracy, macro_f1, calibration_error, and the tables.

        EvaluationError when the data have a label that the model does not know.
        """
        device = device_of(model)
        numbers = label_numbers(data.manifest.labels or (), self._labels)

        def score(items: NDArray[np.int64]) -> ClassSums:
            batch = data.read(items)
            assert batch.labels_B is not None, "data for classify have labels"
            ids_BS = to_tensor(batch.token_ids_BS, torch.int64, device)
            logits_BC = model(ids_BS, to_tensor(batch.segments_BS, torch.int32, device))
            probabilities_BC = torch.softmax(logits_BC.float(), dim=-1).cpu().numpy()
            return ClassSums.of(probabilities_BC, numbers[batch.labels_B])

        empty = ClassSums.empty(len(self._labels))
        sums = sum_over_workers(len(data), self._spec.evaluation_sequences, empty, score)
        return sums.metrics(self._labels)

    def export(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        """See Task."""
        export_network(self._spec, weights, directory)
