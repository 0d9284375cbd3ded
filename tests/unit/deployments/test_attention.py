"""Paged attention on hand-made caches: what no whole model shows."""

import torch

from deployments.messages import SequenceStep
from deployments.runtime.attention import PagedStep, paged_attention
from deployments.runtime.kv_cache import KVCache, lay_out


def test_what_one_sequence_overflowed_never_reaches_another() -> None:
    cache = KVCache(
        layers=range(1),
        num_blocks=4,
        block_tokens=2,
        num_kv_heads=1,
        head_dim=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    layer = torch.nn.Module()
    layer.layer_idx = 0

    def attend(*sequences: SequenceStep) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(sequences))
        query, key, value = (torch.randn((1, 1, len(sequences), 4), generator=generator) for _ in range(3))
        step = PagedStep(layout=lay_out(sequences, cache), cache=cache)
        return paged_attention(layer, query, key, value, None, paged_step=step)[0][0]

    cache.write(0, torch.tensor([0, 1]), torch.full((2, 1, 4), torch.nan), torch.full((2, 1, 4), torch.inf))
    overflowed = SequenceStep(1, (5,), 2, (0, 1), True)
    short = SequenceStep(2, (5,), 0, (2,), True)
    longer = SequenceStep(3, (5,), 1, (3,), True)
    outputs = attend(overflowed, short, longer)
    assert outputs[0].isnan().any()
    assert outputs[1:].isfinite().all(), "rows shorter than the longest are padded, but not with others' values"
