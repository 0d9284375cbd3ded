"""dpo: pairs of a better and a worse answer in, a loss that prefers the better one and stays near a reference out.

Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290), equation 7: -log sigmoid(beta * ((log p(chosen) -
log r(chosen)) - (log p(rejected) - log r(rejected)))), with p the model and r the reference, over the answers' tokens.
The reference is the model with its adapter off, or a frozen copy of the base.
Dimensions: B pairs, S positions, P = 2 B answers (the chosen ones first), N targets.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedModel

from train_jobs.data.manifest import SIDES
from train_jobs.data.shards import Shards
from train_jobs.evaluation.preference import PreferenceSums
from train_jobs.tasks.adapter import adapters_off
from train_jobs.tasks.evaluating import device_of, sum_over_workers, to_tensor
from train_jobs.tasks.export import PREFIX, export_network
from train_jobs.tasks.language import LanguageModel, check_language_model, targets
from train_jobs.tasks.networks import make_network
from train_jobs.tasks.packing import longest_tokens
from train_jobs.tasks.spec import TaskSpec
from train_jobs.trainer.spec import TrainSpec
from train_jobs.trainer.task import LossParts, MicroBatch

_FIELDS = ("token_ids_BS", "segments_BS", "loss_mask_BS")


class PreferenceModel(nn.Module):
    """A language model, and the reference that it is held to; ``reference`` None stands for the adapter's base."""

    def __init__(self, network: PreTrainedModel, reference: PreTrainedModel | None) -> None:
        super().__init__()
        self.network = network
        self.reference = None if reference is None else reference.requires_grad_(False)

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
        with adapters_off(self.network), _in_evaluation(self.network):
            return _log_probability(self.network, *inputs)


@contextmanager
def _in_evaluation(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _log_probability(
    network: PreTrainedModel, token_ids_PS: torch.Tensor, segments_PS: torch.Tensor, loss_mask_PS: torch.Tensor
) -> torch.Tensor:
    """Summed over the targets of each sequence, float32 [P]."""
    logits_NV = LanguageModel.forward(_View(network), token_ids_PS, segments_PS, loss_mask_PS)
    return None
