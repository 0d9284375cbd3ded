"""Perplexity through our own stages: the number that transformers gives, and what moves it."""

import math
from pathlib import Path

import pytest
import torch

from deployments.runtime.quality import QualityError, load_whole, measure, read_windows
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_tokenizer import byte_level_tokenizer

TEXT = "".join(f"Line {number}: hello world, {number * 7919 % 1000}.\n" for number in range(400))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("quality")
    save_tiny_model(directory, "llama", max_position_embeddings=1024)
    byte_level_tokenizer().save_pretrained(directory)
    return directory


def score(directory, windows, quantization=None, dtype=torch.float32):
    runner = load_whole(
        directory, dtype=dtype, quantization=quantization, kernels="torch", context_tokens=max(map(len, windows))
    )
    return measure(runner, windows)


def test_windows_come_from_all_over_the_text(directory):
    windows = read_windows(directory, TEXT, window_tokens=50, num_windows=4)
    tokenizer = byte_level_tokenizer()
    assert [len(window) for window in windows] == [50] * 4
    for index, window in enumerate(windows):
        start = index * (len(TEXT) // 4)
        assert TEXT[start:].startswith(tokenizer.decode(window)[:40])


def test_a_text_that_is_too_short_says_what_to_do(directory):
    with pytest.raises(QualityError, match=r"3 windows of 50 tokens .*longer text, or fewer windows"):
        read_windows(directory, "short. " * 10, window_tokens=50, num_windows=3)


def test_perplexity_is_that_of_transformers(directory):
    from transformers import AutoModelForCausalLM

    windows = read_windows(directory, TEXT, window_tokens=600, num_windows=2)  # three steps each
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        loss = model(torch.tensor(windows), labels=torch.tensor(windows)).loss
        choices = model(torch.tensor(windows)).logits[:, :-1].argmax(-1).flatten().tolist()
    ours = score(directory, windows)
    assert ours.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert list(ours.first_choices) == choices
    assert ours.kernels == "torch"


def test_coarser_weights_agree_less(directory):
    windows = read_windows(directory, TEXT, window_tokens=200, num_windows=2)
    plain, int8, int4 = (score(directory, windows, quantization) for quantization in (None, "int8", "int4"))
    assert plain.same_choice(plain) == 1.0
    assert 1.0 > int8.same_choice(plain) > int4.same_choice(plain) > 0.1
