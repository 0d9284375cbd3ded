"""Where documents lie in a batch's sequences enters; positions and lengths that keep them apart leave.

Dimensions: B sequences, S positions.
"""

import torch

_LENGTH_STEP = 16


def packed_positions(segments_BS: torch.Tensor) -> torch.Tensor:
    """Position of each token within its own document, int64.

    transformers takes positions that begin anew for the border of a document that is not to be looked across, when
    it is given no attention mask. Padding goes on counting: it comes last, so no document can see it, and a batch of
    single documents needs no mask at all.
    """
    index_BS = torch.arange(segments_BS.shape[1], device=segments_BS.device).expand_as(segments_BS)
    begins_BS = (segments_BS[:, 1:] != segments_BS[:, :-1]) & (segments_BS[:, 1:] != 0)
    starts_BS = torch.zeros_like(index_BS)
    starts_BS[:, 1:] = torch.where(begins_BS, index_BS[:, 1:], 0)
    return index_BS - starts_BS.cummax(dim=1).values


def longest_tokens(segments_BS: torch.Tensor) -> int:
    """Positions up to which some sequence has tokens, rounded up to a multiple of 16: what follows is padding."""
    used = int((segments_BS != 0).any(dim=0).sum())
    return min(-(-used // _LENGTH_STEP) * _LENGTH_STEP, segments_BS.shape[1])
