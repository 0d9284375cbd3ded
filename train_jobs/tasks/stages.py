"""A language model in, its stages for pipeline training out: layers cut at their borders, names as in the whole.

Dimensions: B sequences, S positions, N targets, D model width.
"""

import copy
import itertools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cluster.errors import PlanError
from deployments.runtime.cutting import PassThrough, check_passes_hidden_through, plan_parts
from deployments.runtime.support import UnsupportedModelError
from train_jobs.tasks.language import LanguageModel, by_position, score_hidden
from train_jobs.tasks.packing import packed_positions


class LanguageStage(nn.Module):
    """A run of layers; the first one embeds, the last one ends with the loss of every position."""

    def __init__(self, network: PreTrainedModel, *, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.network = network
        self._is_first = is_first
        self._is_last = is_last

    def forward(
        self, x: torch.Tensor, *, segments_BS: torch.Tensor, target_ids_BS: torch.Tensor, loss_mask_BS: torch.Tensor
    ) -> torch.Tensor:
        """Token ids [B, S] or hidden states [B, S, D] in; hidden states out, or losses [B, S], 0 where no target is.

        Losses leave with a shape that does not depend on the number of targets, as a pipeline needs it.
        """
        inputs = {"input_ids": x} if self._is_first else {"inputs_embeds": x}
        positions_BS = packed_positions(segments_BS)
        output = self.network.base_model(**inputs, position_ids=positions_BS, use_cache=False)
        hidden_BSD: torch.Tensor = output.last_hidden_state
        if not self._is_last:
            return hidden_BSD
        nats_N, _ = score_hidden(self.network, hidden_BSD, target_ids_BS, loss_mask_BS)
        return by_position(nats_N, loss_mask_BS)


def cut_stages(model: LanguageModel, num_stages: int) -> list[LanguageStage]:
    """Stages with equally many layers, give or take one; they share the model's parameters.

    PlanError when the architecture cannot be cut, or has fewer layers than stages are wanted.
    """
    network = model.network
    num_layers = _check_can_be_cut(network, num_stages)
    borders = [number * num_layers // num_stages for number in range(num_stages + 1)]
    return [
        LanguageStage(
            _cut(network, start, stop, num_layers=num_layers), is_first=start == 0, is_last=stop == num_layers
        )
        for start, stop in itertools.pairwise(borders)
    ]


def _check_can_be_cut(network: PreTrainedModel, num_stages: int) -> int:
    kind = network.config.model_type
    if not getattr(network.base_model.config, "base_model_pp_plan", None):
        raise PlanError(
            f"strategy pipeline: transformers does not say how {kind} is cut into stages; "
            "choose fsdp to spread a large model"
        )
    try:
        _, layers, _ = plan_parts(network.base_model)
        device = next(network.parameters()).device
        check_passes_hidden_through(_copied(network), dtype=torch.float32, device=device)
    except UnsupportedModelError as error:
        raise PlanError(f"strategy pipeline: {kind} cannot be cut ({error}); choose fsdp") from error
    num_layers = len(getattr(network.base_model, layers))
    if num_stages > num_layers:
        raise PlanError(f"strategy pipeline: {num_stages} stages, but only {num_layers} layers; use fewer workers")
    return num_layers


def _cut(network: PreTrainedModel, start: int, stop: int, *, num_layers: int) -> PreTrainedModel:
    part = _copied(network)
    base = part.base_model
    before, layers, after = plan_parts(base)
    stack = getattr(base, layers)
    chosen = [stack[number] if start <= number < stop else PassThrough() for number in range(num_layers)]
    setattr(base, layers, nn.ModuleList(chosen))
    if start > 0:
        for name in before:
            setattr(base, name, PassThrough())
    if stop < num_layers:
        for name in after:
            setattr(base, name, PassThrough())
        part.set_output_embeddings(nn.Identity())
    else:
        _own_frozen_head(part, network)
    return part


def _own_frozen_head(part: PreTrainedModel, network: PreTrainedModel) -> None:
    """A head that is tied to the embedding and not trained may as well be a copy: nothing can set them apart."""
    head: Any = network.get_output_embeddings()
    embedding: Any = network.get_input_embeddings()
    if head.weight is embedding.weight and not head.weight.requires_grad:
        own = _shallow(head)
        own.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        part.set_output_embeddings(own)


def _copied(network: PreTrainedModel) -> PreTrainedModel:
    """The same modules under a network and a backbone of their own, whose parts can be replaced."""
    copied = _shallow(network)
    setattr(copied, network.base_model_prefix, _shallow(network.base_model))
    return copied


def _shallow(module: Any) -> Any:
    copied = copy.copy(module)
    for name in ("_modules", "_parameters", "_buffers"):
        copied.__dict__[name] = dict(module.__dict__[name])
    return copied
