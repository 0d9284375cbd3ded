"""The definition of int8 and int4 weights: exact cases, error bounds, which tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.runtime.quantize import dequantize, quantize, quantized_bits


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 200), bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**31))
def test_every_value_is_off_by_at_most_half_a_step(rows, columns, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((rows, columns), generator=generator) * torch.rand((rows, 1), generator=generator)
    quantized = quantize(weight, bits=bits)
    assert quantized.q_NK.shape == weight.shape
    lowest, highest = {8: (-127, 127), 4: (0, 15)}[bits]
    assert lowest <= quantized.q_NK.min() <= quantized.q_NK.max() <= highest
    group_size = columns if bits == 8 else 32
    assert quantized.scales_NG.shape == (rows, -(-columns // group_size))
    step = quantized.scales_NG.repeat_interleave(group_size, dim=1)[:, :columns]
    allowed = step / 2 + weight.abs().max() * 1e-6
    assert ((dequantize(quantized, torch.float32) - weight).abs() <= allowed).all()


def test_the_grid_of_q4_1_is_found_again():
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (8, 6, 32), generator=generator)
    q[..., 3], q[..., 17] = 0, 15
    steps, lowest = torch.rand((8, 6, 1), generator=generator) + 0.1, torch.randn((8, 6, 1), generator=generator)
    stored = (q * steps + lowest).flatten(1).bfloat16()
    quantized = quantize(stored, bits=4)
    assert torch.equal(quantized.q_NK.long(), q.flatten(1))
    errors = (dequantize(quantized, torch.float32) - stored.float()).abs().view(8, 6, 32)
    assert (errors <= stored.float().abs().view(8, 6, 32).amax(-1, keepdim=True) * 2**-7).all(), "bfloat16's own"


def test_halves_go_to_the_even_neighbour():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize(weight, bits=8).q_NK.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("bits", [4, 8])
def test_what_fits_the_grid_is_kept_exactly(bits):
    weight = torch.arange(-8, 8, dtype=torch.bfloat16).repeat(3, 9) * torch.tensor([[1.0], [0.25], [8.0]]).bfloat16()
    if bits == 8:
        weight[:, ::64] = 127 * torch.tensor([[1.0], [0.25], [8.0]])
    assert torch.equal(dequantize(quantize(weight, bits=bits), torch.bfloat16), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_of_zeros_stays_zero(bits):
    weight = torch.cat([torch.zeros(2, 64), torch.ones(2, 64)], dim=0 if bits == 8 else 1)
    quantized = quantize(weight, bits=bits)
    assert quantized.scales_NG.shape == ((4, 1) if bits == 8 else (2, 4))
    assert torch.equal(dequantize(quantized, torch.float32), weight)
    assert (quantized.scales_NG[:2, 0] == 0).all()


@pytest.mark.parametrize("value", [1e-45, 1.3e-43, 1e-38])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_smallest_numbers_do_not_become_nan(bits, value):
    weight = torch.tensor([[0.0, value] * 32])
    assert dequantize(quantize(weight, bits=bits), torch.float32).isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("bits", [4, 8])
def test_infinities_are_refused(value, bits):
    weight = torch.ones(2, 64)
    weight[1, 5] = value
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantize(weight, bits=bits)


@pytest.mark.parametrize(
    ("name", "shape", "int8", "int4"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (64, 32), 8, 4),
        ("model.layers.0.mlp.down_proj.weight", (32, 64), 8, 4),
        ("lm_head.weight", (100, 32), 8, 8),
        ("model.embed_tokens.weight", (100, 32), None, None),
        ("model.layers.3.input_layernorm.weight", (32,), None, None),
        ("model.layers.3.self_attn.q_norm.weight", (16,), None, None),
        ("model.layers.3.self_attn.q_proj.bias", (64,), None, None),
        ("model.norm.weight", (32,), None, None),
    ],
)
def test_matrices_of_layers_and_the_head_are_quantized(name, shape, int8, int4):
    assert quantized_bits(name, shape, "int8") == int8
    assert quantized_bits(name, shape, "int4") == int4
    assert quantized_bits(name, shape, None) is None
