"""Native kernels step by step: company, chunks, block tables and threads change no bit; mistakes write nowhere."""

import random
from pathlib import Path

import pytest
import torch

from deployments.messages import SequenceStep
from deployments.runtime.native.slice import NativeSlice
from tests.support.native_slices import (
    NUM_BLOCKS,
    all_logits,
    load_native,
    needs_native,
    random_tokens,
    run_through,
    scattered_blocks,
)
from tests.support.tiny_models import save_tiny_model

pytestmark = needs_native

SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 1,
    "intermediate_size": 80, "max_position_embeddings": 2048,
}  # fmt: skip
FORMATS = [None, "int8", "int4"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mistral")
    save_tiny_model(made, "mistral", **SHAPE | {"sliding_window": 50})
    return made


@pytest.mark.parametrize("quantization", FORMATS)
def test_chunks_change_no_bit(directory: Path, quantization: str | None) -> None:
    slices = load_native(directory, [0, 2], quantization=quantization)
    tokens = random_tokens(150)
    whole = all_logits(slices, tokens)
    for chunk in (1, 7, 16, 33, 64):
        assert torch.equal(all_logits(slices, tokens, chunk=chunk, blocks=scattered_blocks(150, seed=chunk)), whole)


def test_long_contexts_are_cut_into_segments_that_change_no_bit(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", **SHAPE)
    slices = load_native(tmp_path, [0, 2], context_tokens=1200, block_tokens=32)
    tokens = random_tokens(1150)
    whole = all_logits(slices, tokens, blocks=scattered_blocks(1150, block_tokens=32))
    assert whole.isfinite().all()
    chunked = all_logits(slices, tokens, chunk=333, blocks=scattered_blocks(1150, seed=5, block_tokens=32))
    assert torch.equal(chunked, whole)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("quantization", FORMATS)
def test_company_changes_no_bit(directory: Path, quantization: str | None, num_threads: int) -> None:
    slices = load_native(directory, [0, 1, 2], quantization=quantization, num_threads=num_threads)
    contexts = [random_tokens(1 + index * 5 % 31, seed=index) for index in range(32)]
    alone = [all_logits(slices, context, blocks=(NUM_BLOCKS - 1, NUM_BLOCKS - 2))[-1] for context in contexts]
    tables = [(2 * index, 2 * index + 1) for index in range(32)]
    before = [SequenceStep(i, tuple(c[:-1]), 0, tables[i], False) for i, c in enumerate(contexts) if len(c) > 1]
    run_through(slices, before)
    last = [SequenceStep(i, (c[-1],), len(c) - 1, tables[i], True) for i, c in enumerate(contexts)]
    assert torch.equal(run_through(slices, last), torch.stack(alone))


def test_a_mixed_step_and_a_shared_prefix_change_no_bit(directory: Path) -> None:
    slices = load_native(directory, [0, 2])
    prefix, ends = random_tokens(32), [random_tokens(20, seed=1), random_tokens(9, seed=2)]
    expected = [all_logits(slices, [*prefix, *end], blocks=range(4))[-1] for end in ends]
    other = all_logits(slices, random_tokens(45, seed=3), blocks=range(10, 13))[-1]
    run_through(slices, [SequenceStep(0, tuple(prefix), 0, (20, 21), False)])
    all_logits(slices, random_tokens(44, seed=3), blocks=range(30, 33))
    step = [
        SequenceStep(1, tuple(ends[0]), 32, (20, 21, 40, 41), True),
        SequenceStep(2, (random_tokens(45, seed=3)[-1],), 44, (30, 31, 32), True),
        SequenceStep(3, tuple(ends[1]), 32, (20, 21, 50), True),
    ]
    assert torch.equal(run_through(slices, step), torch.stack([expected[0], other, expected[1]]))


def test_only_rows_that_sample_have_logits(directory: Path) -> None:
    slices = load_native(directory, [0, 2])
    step = [SequenceStep(0, (5, 6), 0, (3,), False), SequenceStep(1, (7, 8, 9), 0, (4,), True)]
    logits = run_through(slices, step)
    alone = all_logits(slices, [7, 8, 9], blocks=(5,))
    assert torch.equal(logits, alone[-1:])
    drafted = [SequenceStep(0, (5, 6), 0, (3,), True), SequenceStep(1, (7, 8, 9), 0, (4,), True, num_drafts=1)]
    assert torch.equal(run_through(slices, drafted)[1:], alone[-2:])
    assert run_through(slices, step[:1]).shape == (0, 320)
    assert run_through(slices, []).shape == (0, 320)


def test_what_overflowed_in_a_block_before_is_never_seen(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, "llama", **SHAPE, tie_word_embeddings=False)
    model.model.embed_tokens.weight.data[7] = torch.inf
    model.save_pretrained(tmp_path)
    slices = load_native(tmp_path, [0, 2])
    tokens = [8 if token == 7 else token for token in random_tokens(20)]
    fresh = all_logits(slices, tokens, blocks=(0, 1))
    assert fresh.isfinite().all()
    assert all_logits(slices, [7] * 32, blocks=(2, 3)).isnan().all()
    for chunk in (20, 3, 1):
        assert torch.equal(all_logits(slices, tokens, chunk=chunk, blocks=(2, 3)), fresh)


MISTAKES = {
    "block too high": (SequenceStep(0, (5,), 0, (NUM_BLOCKS,), True), f"block id outside 0..{NUM_BLOCKS - 1}"),
    "negative block": (SequenceStep(0, (5,), 0, (-1,), True), f"block id outside 0..{NUM_BLOCKS - 1}"),
    "too few blocks": (SequenceStep(0, (5,) * 17, 0, (1,), True), "1 blocks cover 16 tokens, .* position 17"),
    "no tokens": (SequenceStep(0, (), 0, (1,), True), "blocks cover"),
    "negative position": (SequenceStep(0, (5,), -1, (1,), True), "blocks cover"),
    "unknown token": (SequenceStep(0, (320,), 0, (1,), True), "token 320 is outside the vocabulary, 0..319"),
    "negative token": (SequenceStep(0, (-1,), 0, (1,), True), "outside the vocabulary"),
    "huge token": (SequenceStep(0, (2**40,), 0, (1,), True), "no 32-bit integer"),
    "beyond the context": (SequenceStep(0, (5,), 256, tuple(range(17)), True), "beyond context_tokens, 256"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_bad_step_is_refused_and_changes_nothing(directory: Path, name: str) -> None:
    wrong, message = MISTAKES[name]
    slices = load_native(directory, [0, 2])
    tokens = random_tokens(20)
    run_through(slices, [SequenceStep(0, tuple(tokens[:-1]), 0, (2, 1), False)])
    with pytest.raises(ValueError, match=message):
        run_through(slices, [SequenceStep(1, (5,), 0, (2,), True), wrong])
    last = run_through(slices, [SequenceStep(0, (tokens[-1],), 19, (2, 1), True)])
    assert torch.equal(last[0], all_logits(slices, tokens, blocks=(8, 9))[-1])


def test_activations_of_another_shape_are_refused(directory: Path) -> None:
    _, last = load_native(directory, [0, 1, 2])
    step = [SequenceStep(0, (5, 6), 0, (1,), True)]
    with pytest.raises(ValueError, match=r"shape \(1, 64\), not 2 rows"):
        last.compute(step, torch.zeros(1, 64), False)
    with pytest.raises(ValueError, match="needs activations"):
        last.compute(step, None, False)


def random_step(generator: random.Random, state: dict[int, list[int]], tables: dict[int, tuple[int, ...]]) -> list:
    parts = []
    for sequence_id in generator.sample(sorted(state), generator.randrange(1, len(state) + 1)):
        new = [generator.randrange(320) for _ in range(generator.choice([1, 1, 1, 2, 5, 17, 40]))]
        position = len(state[sequence_id])
        if position + len(new) > 128:
            state[sequence_id], position = [], 0
        state[sequence_id] = [*state[sequence_id], *new]
        parts.append(SequenceStep(sequence_id, tuple(new), position, tables[sequence_id], True))
    return parts


@pytest.mark.parametrize("quantization", FORMATS)
def test_hundreds_of_random_steps_agree_with_a_slice_of_one_thread(directory: Path, quantization: str | None) -> None:
    generator = random.Random(11)
    blocks = generator.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables = {sequence_id: tuple(blocks[8 * sequence_id : 8 * sequence_id + 8]) for sequence_id in range(12)}
    state: dict[int, list[int]] = {sequence_id: [] for sequence_id in tables}
    many = load_native(directory, [0, 1, 2], quantization=quantization, num_threads=4)
    one = load_native(directory, [0, 2], quantization=quantization, num_threads=1)
    for _ in range(100):
        step = random_step(generator, state, tables)
        assert torch.equal(run_through(many, step), run_through(one, step))


def test_slices_come_and_go_with_their_threads(directory: Path) -> None:
    expected = all_logits(load_native(directory, [0, 2]), random_tokens(9))
    for num_threads in (1, 2, 5):
        for _ in range(5):
            made: list[NativeSlice] = load_native(directory, [0, 2], num_threads=num_threads)
            assert torch.equal(all_logits(made, random_tokens(9)), expected)
