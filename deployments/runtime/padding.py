"""Tokenized inputs of different lengths in, one rectangle of token ids and its mask out. B inputs, T longest."""

from collections.abc import Sequence

import torch


def pad(inputs: Sequence[Sequence[int]], padding_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (1 for a token, 0 for padding), both [B, T] int64; padding stands on the right."""
    longest = max(len(token_ids) for token_ids in inputs)
    ids_BT = torch.full((len(inputs), longest), padding_id, device=device)
    mask_BT = torch.zeros((len(inputs), longest), dtype=torch.int64, device=device)
    for index, token_ids in enumerate(inputs):
        ids_BT[index, : len(token_ids)] = torch.tensor(token_ids, device=device)
        mask_BT[index, : len(token_ids)] = 1
    return ids_BT, mask_BT
