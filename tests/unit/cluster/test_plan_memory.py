"""Bytes per stage, against sums done by hand."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.plan.memory import StepShape, activation_bytes, kv_bytes, kv_bytes_per_token, weight_bytes
from tests.unit.cluster.plan_examples import SMOLLM2_LAYER_PARAMS, facts, minilm_facts

SHAPE = StepShape(dtype="bfloat16", max_step_tokens=512, max_running=32, num_blocks=1024, block_tokens=16)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_one_stage_holds_every_parameter_once(dtype, size):
    every = 28_311_552 + 30 * SMOLLM2_LAYER_PARAMS + 576
    assert weight_bytes(facts(), start=0, stop=30, dtype=dtype) == every * size


def test_a_tied_head_on_its_own_stage_is_a_second_copy_of_the_embedding():
    first = weight_bytes(facts(), start=0, stop=19, dtype="float32")
    last = weight_bytes(facts(), start=19, stop=30, dtype="float32")
    assert first == (28_311_552 + 19 * SMOLLM2_LAYER_PARAMS) * 4
    assert last == (11 * SMOLLM2_LAYER_PARAMS + 576 + 28_311_552) * 4


@given(cuts=st.sets(st.integers(1, 29), max_size=5))
def test_untied_stages_add_up_to_the_whole_model(cuts):
    untied = facts(tied_head=False, head_params=1000)
    bounds = [0, *sorted(cuts), 30]
    parts = sum(weight_bytes(untied, start=start, stop=stop, dtype="float16") for start, stop in pairwise(bounds))
    assert parts == weight_bytes(untied, start=0, stop=30, dtype="float16")


@pytest.mark.parametrize(("quantization", "bytes_of_row"), [("int8", 576 + 4), ("int4", 576 // 2 + 576 // 32 * 4)])
def test_quantized_layers_are_integers_and_scales_beside_the_embedding_and_a_head_in_8_bits(
    quantization, bytes_of_row
):
    layers = 30 * SMOLLM2_LAYER_PARAMS // 576 * bytes_of_row
    head = 28_311_552 // 576 * 580
    whole = weight_bytes(facts(), start=0, stop=30, dtype="bfloat16", quantization=quantization)
    assert whole == layers + head + (28_311_552 + 576) * 2
    parts = [
        weight_bytes(facts(), start=start, stop=stop, dtype="bfloat16", quantization=quantization)
        for start, stop in ((0, 10), (10, 30))
    ]
    assert sum(parts) == whole, "a quantized head shares no tensor with the embedding, on one stage or two"


def test_kv_cache_is_blocks_times_layers_times_keys_and_values():
    assert kv_bytes(facts(), SHAPE, 19) == 1024 * 16 * 19 * 2 * 3 * 64 * 2


def test_an_embedding_model_keeps_no_past():
    assert kv_bytes(minilm_facts(), SHAPE, 6) == 0


def test_many_sampled_rows_make_the_logits_the_largest_tensor_of_the_last_stage_only():
    busy = StepShape(dtype="bfloat16", max_step_tokens=512, max_running=512, num_blocks=1024, block_tokens=16)
    assert activation_bytes(facts(), busy, last=True) == 512 * 49152 * (2 + 4 + 4)
    assert activation_bytes(facts(), busy, last=False) == activation_bytes(facts(), SHAPE, last=False)


def test_drafts_have_logits_too_but_no_more_than_sequences():
    shape = {"dtype": "bfloat16", "max_step_tokens": 512, "num_blocks": 1024, "block_tokens": 16}
    drafting = StepShape(**shape, max_running=512, speculative_tokens=7)
    assert activation_bytes(facts(), drafting, last=True) == 1024 * 49152 * (2 + 4 + 4)
    assert StepShape(**shape, max_running=1, speculative_tokens=7).max_logits == 8


def test_decoding_gathers_at_most_twice_the_tokens_of_the_pool():
    larger = StepShape(dtype="bfloat16", max_step_tokens=512, max_running=32, num_blocks=1025, block_tokens=16)
    more = activation_bytes(facts(), larger, last=False) - activation_bytes(facts(), SHAPE, last=False)
    assert more == 2 * 16 * kv_bytes_per_token(facts(), "bfloat16")


def test_more_tokens_in_a_step_need_more_memory():
    larger = StepShape(dtype="bfloat16", max_step_tokens=1024, max_running=32, num_blocks=1024, block_tokens=16)
    assert activation_bytes(facts(), larger, last=False) > activation_bytes(facts(), SHAPE, last=False)


def test_native_kernels_gather_nothing_and_hold_keys_in_rows_of_32():
    native = replace(SHAPE, kernels="native")
    padded = facts().model_copy(update={"head_dim": 80})
    assert kv_bytes(facts(), native, 19) == kv_bytes(facts(), SHAPE, 19)
    assert kv_bytes(padded, native, 1) * 160 == kv_bytes(padded, SHAPE, 1) * (96 + 80)
    hidden, queries, kv, inner = 576, 9 * 64, 3 * 64, 1536
    layer = 512 * (4 * (hidden + queries + 2 * kv) + 2 * (hidden + queries + inner))
    assert activation_bytes(facts(), native, last=False) == layer
    assert activation_bytes(facts(), native, last=True) == layer + 32 * 49152 * 12


def test_integers_before_matrix_products_take_three_times_the_room():
    plain, quantized = (replace(SHAPE, kernels="native", quantization=each) for each in (None, "int4"))
    more = activation_bytes(facts(), quantized, last=False) - activation_bytes(facts(), plain, last=False)
    assert more == 512 * 4 * (576 + 576 + 1536)


@pytest.mark.parametrize("last", [False, True])
def test_where_the_processor_decides_the_hungrier_kernels_are_counted(last):
    each = [activation_bytes(facts(), replace(SHAPE, kernels=kernels), last=last) for kernels in ("torch", "native")]
    assert activation_bytes(facts(), replace(SHAPE, kernels="auto"), last=last) == max(each)


def test_torch_unpacks_quantized_weights_and_cannot_share_a_tied_head_any_more():
    unpacked = weight_bytes(facts(), start=0, stop=30, dtype="bfloat16", quantization="int4", kernels="torch")
    assert unpacked == weight_bytes(facts(), start=0, stop=30, dtype="bfloat16") + 28_311_552 * 2
