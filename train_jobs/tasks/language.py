"""A causal language model as training calls it: packed sequences in, logits of their targets alone out.

Dimensions: B sequences, S positions, N targets, D model width, V vocabulary.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from cluster.errors import PlanError
from train_jobs.tasks.packing import packed_positions
from train_jobs.trainer.task import LossParts

_ROUNDING = 1e-4  # of the largest logit: float32 in another order, not another meaning


class LanguageModel(nn.Module):
    """Multiplies by the output head only where a target is to be predicted: heads are the largest matrices."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, token_ids_BS: torch.Tensor, segments_BS: torch.Tensor, loss_mask_BS: torch.Tensor
    ) -> torch.Tensor:
        """See :func:`target_logits`."""
        return target_logits(self.network, token_ids_BS, segments_BS, loss_mask_BS)


def target_logits(
    network: PreTrainedModel, token_ids_BS: torch.Tensor, segments_BS: torch.Tensor, loss_mask_BS: torch.Tensor
) -> torch.Tensor:
    """Logits [N, V] that predict the tokens where ``loss_mask_BS`` is set, row after row."""
    hidden_BSD: torch.Tensor = network.base_model(
        input_ids=token_ids_BS, position_ids=packed_positions(segments_BS), use_cache=False
    ).last_hidden_state
    return head_logits(network, hidden_BSD[:, :-1][loss_mask_BS[:, 1:]])


def head_logits(network: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """What the network's own forward pass makes of hidden states; :func:`check_language_model` holds it to that."""
    head = network.get_output_embeddings()
    assert head is not None, "transformers' causal language models have one"
    logits_NV: torch.Tensor = head(hidden_ND)
    softcap = getattr(network.config.get_text_config(), "final_logit_softcapping", None)
    return logits_NV if softcap is None else torch.tanh(logits_NV / softcap) * softcap


def targets(token_ids_BS: torch.Tensor, loss_mask_BS: torch.Tensor) -> torch.Tensor:
    """Token ids of the targets [N], row after row."""
    return token_ids_BS[:, 1:][loss_mask_BS[:, 1:]]


def language_loss(logits_NV: torch.Tensor, target_ids_N: torch.Tensor) -> LossParts:
    """Cross entropy summed over the targets."""
    total = cross_entropy(logits_NV.float(), target_ids_N, reduction="sum")
    return LossParts(sum=total, count=torch.tensor(float(len(target_ids_N)), device=total.device))


@torch.no_grad()
def check_language_model(model: LanguageModel) -> None:
    """PlanError when this architecture's logits are not those of transformers, or packed documents meet in it."""
    network, device = model.network, next(model.parameters()).device
    training = model.training
    model.eval()
    ids_BS = torch.arange(9, device=device)[None] % network.config.get_text_config().vocab_size
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    documents = [network(input_ids=part, use_cache=False).logits[0] for part in ids_BS.split([5, 4], dim=1)]
    whole_NV = model(ids_BS, torch.ones_like(ids_BS), mask_BS)
    plain_NV = network(input_ids=ids_BS, use_cache=False).logits[0, :-1]
    packed_NV = model(ids_BS, (torch.arange(9, device=device)[None] >= 5).int() + 1, mask_BS)
    model.train(training)
    kind = network.config.model_type
    if _differ(whole_NV, plain_NV):
        raise PlanError(f"base: {kind} changes its logits in a way that training does not know; choose another model")
    if _differ(packed_NV, torch.cat(documents)[:-1]):
        raise PlanError(
            f"base: {kind} lets the documents of a packed sequence see each other; choose a model whose layers are "
            "all attention"
        )


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > _ROUNDING * other.abs().max())
