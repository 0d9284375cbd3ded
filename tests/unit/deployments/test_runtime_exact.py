"""Cut models give transformers' own tokens, whatever the cut, the chunking and the batch company."""

import random
from pathlib import Path

import pytest
import torch

from deployments.messages import SamplingParams, SequenceStart, SequenceStep, StepInput
from deployments.runtime.runner import StageRunner
from deployments.runtime.support import UnsupportedModelError
from tests.support.local_stages import load_runners
from tests.support.tiny_models import ARCHITECTURES, greedy, save_tiny_model

BLOCK_TOKENS = 4
NUM_BLOCKS = 64


def make_runners(directory: Path, borders: list[int], device: str = "cpu") -> list[StageRunner]:
    return load_runners(directory, borders, num_blocks=NUM_BLOCKS, block_tokens=BLOCK_TOKENS, device=device)


def run_step(runners: list[StageRunner], step: StepInput) -> dict[int, int]:
    hidden = None
    for runner in runners:
        hidden = runner.run(step, hidden)
    return {sample.sequence_id: sample.token_id for sample in hidden}


def start_of(sequence_id: int, prompt: list[int], **sampling) -> SequenceStart:
    params = SamplingParams(**({"max_tokens": 64, "temperature": 0.0} | sampling))
    return SequenceStart(sequence_id, tuple(prompt), len(prompt), params, 7, 0, (2,))


def generate(runners: list[StageRunner], prompts: list[list[int]], num_tokens: int, chunk: int) -> list[list[int]]:
    """All prompts in one batch, prefilled in chunks, blocks scattered over the cache."""
    free = list(range(NUM_BLOCKS))
    random.Random(3).shuffle(free)
    tables = [[free.pop() for _ in range((len(prompt) + num_tokens) // BLOCK_TOKENS + 1)] for prompt in prompts]
    tokens = [list(prompt) for prompt in prompts]
    computed = [0] * len(prompts)
    started = tuple(start_of(index, prompt) for index, prompt in enumerate(prompts))
    step_number = 0
    while any(len(t) - len(p) < num_tokens for t, p in zip(tokens, prompts, strict=True)):
        parts = []
        for index, sequence in enumerate(tokens):
            if len(sequence) - len(prompts[index]) >= num_tokens:
                continue
            new = sequence[computed[index] : computed[index] + chunk]
            done = computed[index] + len(new) == len(sequence)
            parts.append(SequenceStep(index, tuple(new), computed[index], tuple(tables[index]), done))
            computed[index] += len(new)
        samples = run_step(runners, StepInput(step=step_number, sequences=tuple(parts), started=started))
        started = ()
        step_number += 1
        for index, token in samples.items():
            tokens[index].append(token)
    return [sequence[len(prompt) :] for sequence, prompt in zip(tokens, prompts, strict=True)]


PROMPTS = [[5, 9, 200, 31], [17, 44, 3, 90, 12, 250, 8, 77, 61, 19, 33], [301], list(range(10, 40))]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_greedy_tokens_equal_transformers_for_every_cut(model_type: str, tmp_path: Path) -> None:
    reference = save_tiny_model(tmp_path, model_type)
    expected = [greedy(reference, prompt, 16) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) > 8, "the reference is too dull to tell mistakes"
    for borders in ([0, 4], [0, 2, 4], [0, 3, 4], [0, 1, 2, 4]):
        assert generate(make_runners(tmp_path, borders), PROMPTS, 16, chunk=7) == expected, borders


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_greedy_tokens_equal_transformers_on_cuda(model_type: str, tmp_path: Path) -> None:
    reference = save_tiny_model(tmp_path, model_type)
    expected = [greedy(reference, prompt, 16) for prompt in PROMPTS]
    for borders in ([0, 4], [0, 1, 2, 4]):
        assert generate(make_runners(tmp_path, borders, "cuda"), PROMPTS, 16, chunk=7) == expected, borders


def test_company_and_chunk_size_do_not_change_tokens(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    together = generate(make_runners(tmp_path, [0, 1, 4]), PROMPTS, 12, chunk=64)
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        for chunk in (1, 5):
            assert generate(make_runners(tmp_path, [0, 1, 4]), [prompt], 12, chunk=chunk) == [tokens]


def test_a_stage_holds_only_its_slice(tmp_path: Path) -> None:
    whole = save_tiny_model(tmp_path, "qwen2")
    first, middle, last = make_runners(tmp_path, [0, 1, 3, 4])
    layer = sum(p.nbytes for p in whole.model.layers[0].parameters())
    embedding = whole.model.embed_tokens.weight.nbytes
    assert first.weight_bytes == layer + embedding
    assert middle.weight_bytes == 2 * layer
    assert last.weight_bytes == layer + embedding + whole.model.norm.weight.nbytes
    names = dict(middle.slice.model.named_parameters())
    assert {name.split(".")[2] for name in names} == {"1", "2"}
    assert all(torch.equal(p, dict(whole.named_parameters())[name]) for name, p in names.items())


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "no pipeline plan"),
        ("granite", {"embedding_multiplier": 12.0}, "outside embed_tokens, layers, norm"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4,
                                       "original_max_position_embeddings": 64}}, "context_tokens <= 64"),
    ],
)  # fmt: skip
def test_what_cannot_be_sharded_is_refused_with_the_reason(
    model_type: str, overrides: dict, reason: str, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path, model_type, **overrides)
    with pytest.raises(UnsupportedModelError, match=reason):
        make_runners(tmp_path, [0, 1, 4] if model_type != "gpt2" else [0, 1, 2])


def test_granite_runs_unsharded(tmp_path: Path) -> None:
    reference = save_tiny_model(tmp_path, "granite", embedding_multiplier=12.0)
    expected = [greedy(reference, prompt, 8) for prompt in PROMPTS]
    assert generate(make_runners(tmp_path, [0, 4]), PROMPTS, 8, chunk=64) == expected


def test_a_block_table_that_is_too_short_is_an_error(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    (runner,) = make_runners(tmp_path, [0, 4])
    step = StepInput(step=0, sequences=(SequenceStep(1, (5, 6, 7, 8, 9), 0, (3,), False),))
    with pytest.raises(ValueError, match="1 blocks cover 4 tokens, but the step ends at position 5"):
        runner.run(step, None)
