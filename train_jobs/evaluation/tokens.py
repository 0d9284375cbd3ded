"""A causal model's logits in, sums over the targets they predict out.

Dimensions: B sequences, S positions, T tokens, N targets, V vocabulary.
"""

from collections.abc import Callable

import torch

from train_jobs.evaluation.errors import EvaluationError
from train_jobs.evaluation.text import TextSums
from train_jobs.evaluation.windows import windows

_ROWS_AT_ONCE = 512  # of logits that are turned to float32 together


def score_sequences(
    logits_BSV: torch.Tensor, token_ids_BS: torch.Tensor, loss_mask_BS: torch.Tensor, *, num_bytes: int
) -> TextSums:
    """Sums over the positions where ``loss_mask_BS`` is set, each predicted by the logits one position before.

    ``num_bytes`` are those of the text that these targets spell. A mask at the first position is a bug: nothing
    comes before it.
    """
    mask_BS = loss_mask_BS.bool()
    assert not mask_BS[:, 0].any(), "the first token of a sequence cannot be a target"
    return score_targets(logits_BSV[:, :-1][mask_BS[:, 1:]], token_ids_BS[:, 1:][mask_BS[:, 1:]], num_bytes=num_bytes)


def score_targets(logits_NV: torch.Tensor, token_ids_N: torch.Tensor, *, num_bytes: int) -> TextSums:
    """Sums over targets and the logits that predict them."""
    total = TextSums(num_bytes=num_bytes)
    for start in range(0, len(token_ids_N), _ROWS_AT_ONCE):
        logits = logits_NV[start : start + _ROWS_AT_ONCE]
        token_ids = token_ids_N[start : start + _ROWS_AT_ONCE]
        logprobs = torch.log_softmax(logits.detach().float(), dim=-1)
        nats = -logprobs.gather(1, token_ids.long()[:, None])[:, 0]
        correct = logits.argmax(dim=-1) == token_ids
        total += TextSums.of(nats.cpu().numpy(), correct.cpu().numpy(), num_bytes=0)
    return total


def score_long_text(
    predict: Callable[[torch.Tensor], torch.Tensor],
    token_ids_T: torch.Tensor,
    *,
    window_tokens: int,
    stride_tokens: int,
    num_bytes: int,
) -> TextSums:
    """Sums over every token but the first of a text of any length, by sliding windows.

    ``predict`` maps token ids [1, S] to logits [1, S, V]. ``num_bytes`` are those of the text without its first
    token. Raises EvaluationError for a text of fewer than two tokens, PlanError for a stride that does not fit.
    """
    if len(token_ids_T) < 2:
        raise EvaluationError(f"evaluation: a text of {len(token_ids_T)} tokens; allowed: 2 or more")
    total = TextSums(num_bytes=num_bytes)
    for window in windows(len(token_ids_T), window_tokens=window_tokens, stride_tokens=stride_tokens):
        with torch.no_grad():
            logits_SV = predict(token_ids_T[None, window.start : window.stop])[0]
        first = window.first_target - window.start - 1
        total += score_targets(logits_SV[first:-1], token_ids_T[window.first_target : window.stop], num_bytes=0)
    return total
