"""A causal language model as training calls it: packed sequences in, how likely their targets are out.

Dimensions: B sequences, S positions, N targets, D model width, V vocabulary.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cluster.errors import PlanError
from train_jobs.tasks.packing import packed_positions

ROWS_AT_ONCE = 4096
"""Targets whose logits are in memory together."""
_ROUNDING = 1e-4  # of the largest logit: float32 in another order, not another meaning


class LanguageModel(nn.Module):
    """Multiplies by the output head only where a target is to be predicted: heads are the largest matrices."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, token_ids_BS: torch.Tensor, segments_BS: torch.Tensor, loss_mask_BS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :func:`score_targets`."""
        return score_targets(self.network, token_ids_BS, segments_BS, loss_mask_BS)


def score_targets(
    network: PreTrainedModel, token_ids_BS: torch.Tensor, segments_BS: torch.Tensor, loss_mask_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the tokens where ``loss_mask_BS`` is set, row after row: negative log-likelihoods in float32 and whether
    each was the most likely token, both [N].
    """
    hidden_BSD: torch.Tensor = network.base_model(
        input_ids=token_ids_BS, position_ids=packed_positions(segments_BS), use_cache=False
    ).last_hidden_state
    return score_hidden(network, hidden_BSD, token_ids_BS, loss_mask_BS)


def score_hidden(
    network: PreTrainedModel, hidden_BSD: torch.Tensor, token_ids_BS: torch.Tensor, loss_mask_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`score_targets`, from the last layer's output.

    Of many targets, some thousands are scored at a time and again in the backward pass, so that the logits of no more
    than those are ever in memory: with large vocabularies they would take more than all layers.
    """
    hidden_ND = hidden_BSD[:, :-1][loss_mask_BS[:, 1:]]
    ids_N = token_ids_BS[:, 1:][loss_mask_BS[:, 1:]]
    if len(ids_N) <= ROWS_AT_ONCE:
        return _score(network, hidden_ND, ids_N)
    parts = [
        checkpoint(_score, network, hidden, ids, use_reentrant=False, preserve_rng_state=False)
        for hidden, ids in zip(torch.split(hidden_ND, ROWS_AT_ONCE), torch.split(ids_N, ROWS_AT_ONCE), strict=True)
    ]
    nats, correct = zip(*parts, strict=True)
    return torch.cat(nats), torch.cat(correct)


def _score(
    network: PreTrainedModel, hidden_ND: torch.Tensor, ids_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_NV = head_logits(network, hidden_ND)
    nats_N = cross_entropy(logits_NV.float(), ids_N, reduction="none")
    return nats_N, logits_NV.detach().argmax(dim=-1) == ids_N


def by_position(values_N: torch.Tensor, loss_mask_BS: torch.Tensor) -> torch.Tensor:
    """Values of the targets at their positions [B, S], 0 elsewhere."""
    values_BS = torch.zeros(loss_mask_BS.shape, device=values_N.device)
    values_BS[:, 1:] = values_BS[:, 1:].masked_scatter(loss_mask_BS[:, 1:], values_N)
    return values_BS


def head_logits(network: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """What the network's own forward pass makes of hidden states; :func:`check_language_model` holds it to that."""
    head = network.get_output_embeddings()
    assert head is not None, "transformers' causal language models have one"
    logits_NV: torch.Tensor = head(hidden_ND)
    softcap = getattr(network.config.get_text_config(), "final_logit_softcapping", None)
    return logits_NV if softcap is None else torch.tanh(logits_NV / softcap) * softcap


@torch.no_grad()
def check_language_model(model: LanguageModel) -> None:
    """PlanError when this architecture's logits are not those of transformers, or packed documents meet in it."""
    network, training = model.network, model.training
    network.eval()
    ids_BS = torch.arange(9)[None] % network.config.get_text_config().vocab_size
    documents = [network(input_ids=part, use_cache=False).logits for part in ids_BS.split([5, 4], dim=1)]
    plain_BSV = network(input_ids=ids_BS, use_cache=False).logits
    whole_BSV = _all_logits(network, ids_BS, torch.ones_like(ids_BS))
    packed_BSV = _all_logits(network, ids_BS, torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2]]))
    network.train(training)
    kind = network.config.model_type
    if _differ(whole_BSV, plain_BSV):
        raise PlanError(f"base: {kind} changes its logits in a way that training does not know; choose another model")
    if _differ(packed_BSV, torch.cat(documents, dim=1)):
        raise PlanError(
            f"base: {kind} lets the documents of a packed sequence see each other; choose a model whose layers are "
            "all attention"
        )


def _all_logits(network: PreTrainedModel, ids_BS: torch.Tensor, segments_BS: torch.Tensor) -> torch.Tensor:
    positions_BS = packed_positions(segments_BS)
    output = network.base_model(input_ids=ids_BS, position_ids=positions_BS, use_cache=False)
    return head_logits(network, output.last_hidden_state)


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > _ROUNDING * other.abs().max())
