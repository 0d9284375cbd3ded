"""Attention over the paged cache, plugged into transformers' modules by name.

transformers calls the registered function in every attention layer with queries, keys and values of the whole
step; it stores the new keys and values, then lets each sequence attend to its own context only.
Notation as in :mod:`deployments.runtime.kv_cache`, and H query heads, G = H / K queries per KV head.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from deployments.runtime.kv_cache import DecodeBatch, KVCache, PrefillSlice, StepLayout

NAME = "manta_paged"


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedStep:
    """What the attention layers of one step need; travels through transformers' keyword arguments."""

    layout: StepLayout
    cache: KVCache


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - part of transformers' interface; the layout holds the masks
    *,
    paged_step: PagedStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
    if s_aux is not None:
        raise ValueError("attention sinks are not supported by the paged attention")
    layer: int = module.layer_idx  # type: ignore[assignment]
    layout, cache = paged_step.layout, paged_step.cache
    cache.write(layer, layout.slots_T, key[0].transpose(0, 1), value[0].transpose(0, 1))
    query_THD = query[0].transpose(0, 1)
    output = torch.empty(
        (query_THD.shape[0], query_THD.shape[1], value.shape[-1]), dtype=query.dtype, device=query.device
    )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    for prefill in layout.prefills:
        rows = slice(prefill.row_start, prefill.row_stop)
        output[rows] = _attend_prefill(query_THD[rows], cache, layer, prefill, scale, sliding_window, softcap)
    for decodes in layout.decodes:
        rows_B = decodes.rows_B
        output[rows_B] = _attend_decodes(query_THD[rows_B], cache, layer, decodes, scale, sliding_window, softcap)
    return output[None], None


def _attend_prefill(
    query_NHD: torch.Tensor,
    cache: KVCache,
    layer: int,
    prefill: PrefillSlice,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    key_SKD, value_SKD = cache.read(layer, prefill.slots_S)
    num_groups = query_NHD.shape[1] // key_SKD.shape[1]
    query = query_NHD.transpose(0, 1)[None]
    key = key_SKD.transpose(0, 1).repeat_interleave(num_groups, dim=0)[None]
    value = value_SKD.transpose(0, 1).repeat_interleave(num_groups, dim=0)[None]
    out = _attend(query, key, value, prefill.mask(_binding(window, len(prefill.slots_S))), scale, softcap)
    return out[0].transpose(0, 1)


def _attend_decodes(
    query_BHD: torch.Tensor,
    cache: KVCache,
    layer: int,
    decodes: DecodeBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Queries that share a KV head are folded into rows, so keys and values are read once and never repeated."""
    key_BSKD, value_BSKD = cache.read(layer, decodes.slots_BS)
    batch, num_heads, width = query_BHD.shape
    num_kv_heads = key_BSKD.shape[2]
    query = query_BHD.view(batch, num_kv_heads, num_heads // num_kv_heads, width)
    mask = decodes.mask(_binding(window, decodes.slots_BS.shape[1]))
    out = _attend(query, key_BSKD.transpose(1, 2), value_BSKD.transpose(1, 2), mask, scale, softcap)
    return out.reshape(batch, num_heads, -1)


def _binding(window: int | None, length: int) -> int | None:
    """A window wider than the context restricts nothing, so the mask without it is shared."""
    return window if window is not None and window < length else None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = query @ key.transpose(-1, -2) * scale
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


AttentionInterface.register(NAME, paged_attention)
