"""dpo: pairs of a better and a worse answer in, a loss that prefers the better one and stays near a reference out.

Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290), equation 7:

    -log sigmoid(beta * ((log p(chosen) - log r(chosen)) - (log p(rejected) - log r(rejected))))

with p the model and r the reference, over the answers' tokens. The reference is the model
with its adapter off, or a frozen copy of the base.
Dimensions: B pairs, S positions, P = 2 B answers (the chosen ones first), N targets.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from cluster.runs.prepared import SIDES
from train_jobs.data.shards import Shards
from train_jobs.evaluation.preference import PreferenceSums
from train_jobs.tasks.adapter import BaseSwitch
from train_jobs.tasks.evaluating import device_of, sum_over_workers, to_tensor
from train_jobs.tasks.export import export_network
from train_jobs.tasks.language import LanguageModel, by_position, check_language_model, score_targets
from train_jobs.tasks.networks import make_network
from train_jobs.tasks.packing import longest_tokens
from train_jobs.tasks.spec import TaskSpec
from train_jobs.trainer.spec import TrainSpec
from train_jobs.trainer.task import LossParts, MicroBatch

_FIELDS = {"token_ids_BS": torch.int64, "segments_BS": torch.int32, "loss_mask_BS": torch.bool}
"""Arrays of the data that the model reads, in its order."""


class PreferenceModel(nn.Module):
    """A language model, and the reference that it is held to; ``reference`` None stands for the adapter's base."""

    def __init__(self, network: PreTrainedModel, reference: PreTrainedModel | None) -> None:
        super().__init__()
        self.network = network
        self.reference = None if reference is None else reference.requires_grad_(False)
        self._base = BaseSwitch(network)

    def train(self, mode: bool = True) -> Self:
        """The reference never drops anything out."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def forward(
        self, token_ids_PS: torch.Tensor, segments_PS: torch.Tensor, loss_mask_PS: torch.Tensor
    ) -> torch.Tensor:
        """Log-probability of each answer by the model less that by the reference, [P]."""
        stop = longest_tokens(segments_PS)
        inputs = (token_ids_PS[:, :stop], segments_PS[:, :stop], loss_mask_PS[:, :stop])
        with torch.no_grad():
            reference_P = self._reference(*inputs)
        return _log_probability(self.network, *inputs) - reference_P

    def _reference(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self.reference is not None:
            return _log_probability(self.reference, *inputs)
        with self._base.on():
            return _log_probability(self.network, *inputs)


def _log_probability(
    network: PreTrainedModel, token_ids_PS: torch.Tensor, segments_PS: torch.Tensor, loss_mask_PS: torch.Tensor
) -> torch.Tensor:
    """Summed over the targets of each sequence, float32 [P]."""
    nats_N, _ = score_targets(network, token_ids_PS, segments_PS, loss_mask_PS)
    return -by_position(nats_N, loss_mask_PS).sum(dim=1)


class PreferenceTask:
    """Answers that were preferred."""

    def __init__(self, spec: TaskSpec) -> None:
        assert spec.dpo_beta is not None, "check_task has refused it"
        self._spec = spec
        self._beta = spec.dpo_beta
        self._checked = False

    def build_model(self, spec: TrainSpec) -> nn.Module:
        """See Task; the language model is compared with transformers' own forward pass first."""
        network = make_network(self._spec, spec.seed).module
        if not self._checked:
            check_language_model(LanguageModel(network))
            self._checked = True
        reference = None if self._spec.adapter is not None else make_network(self._spec, spec.seed).module
        return PreferenceModel(network, reference)

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> LossParts:
        """See Task; the mean is over pairs."""
        inputs = [torch.cat([micro_batch[f"{side}_{name}"] for side in SIDES]) for name in _FIELDS]
        nats_B = self._losses(model(*inputs))
        return LossParts(sum=nats_B.sum(), count=torch.tensor(float(len(nats_B)), device=nats_B.device))

    def evaluate(self, model: nn.Module, data: Mapping[str, Shards]) -> Mapping[str, Any]:
        """Metrics of ``PreferenceSums``: loss, accuracy, margin; ``data`` are both sides by name."""
        device = device_of(model)

        def score(items: NDArray[np.int64]) -> PreferenceSums:
            sides = [data[side].read(items) for side in SIDES]
            inputs = [
                torch.cat([to_tensor(getattr(side, name), dtype, device) for side in sides])
                for name, dtype in _FIELDS.items()
            ]
            gains_P = model(*inputs)
            chosen_B, rejected_B = (self._beta * gains_P).double().cpu().numpy().reshape(2, -1)
            return PreferenceSums.of(chosen_B, rejected_B, self._losses(gains_P).double().cpu().numpy())

        sums = sum_over_workers(len(data["chosen"]), self._spec.evaluation_sequences, PreferenceSums(), score)
        return sums.metrics()

    def export(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        """See Task."""
        export_network(self._spec, weights, directory)

    def _losses(self, gains_P: torch.Tensor) -> torch.Tensor:
        """Of each pair [B]; ``gains_P`` are log-probabilities less the reference's."""
        chosen_B, rejected_B = gains_P.chunk(2)
        return -logsigmoid(self._beta * (chosen_B - rejected_B))
