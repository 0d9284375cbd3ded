"""The sampler is a pure function of (logits, params, seed, choice, position)."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.messages import SamplingParams, SequenceStart
from deployments.runtime.sample import Sampler, SequenceSampler, _first_above

VOCABULARY = 50


def start(
    sequence_id: int = 1, prompt: tuple[int, ...] = (3, 4), emitted=(), *, seed=11, choice=0, eos=(2,), **params
):
    sampling = SamplingParams(**({"max_tokens": 64} | params))
    return SequenceStart(sequence_id, prompt + tuple(emitted), len(prompt), sampling, seed, choice, eos)


def logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn((rows, VOCABULARY), generator=torch.Generator().manual_seed(seed)) * 2


def draw(begin: SequenceStart, row: torch.Tensor) -> int:
    sampler = Sampler()
    sampler.start(begin)
    return sampler.sample([begin.sequence_id], row[None] if row.dim() == 1 else row)[0].token_id


def test_greedy_takes_the_most_likely_token() -> None:
    row = logits()[0]
    assert draw(start(temperature=0.0), row) == int(row.argmax())


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-50])
def test_the_colder_the_closer_to_greedy(temperature: float) -> None:
    row = logits()[0] * 10
    assert draw(start(temperature=temperature), row) == int(row.argmax())


def test_draws_follow_the_distribution() -> None:
    row = logits()[0]
    counts = Counter(draw(start(seed=seed), row) for seed in range(4000))
    expected = torch.softmax(row, -1) * 4000
    chi_squared = sum((counts[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected) if e >= 5)
    assert chi_squared < 90, "50 degrees of freedom: 90 is beyond the 99.9th percentile"


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(-(2**63), 2**63 - 1), choice=st.integers(0, 7), company=st.integers(0, 5), data=st.data())
def test_company_never_changes_a_draw(seed: int, choice: int, company: int, data: st.DataObject) -> None:
    params = {
        "temperature": data.draw(st.sampled_from([0.0, 0.7, 1.0, 1.9])),
        "top_p": data.draw(st.sampled_from([1.0, 0.9, 0.3])),
        "top_k": data.draw(st.sampled_from([None, 1, 5, VOCABULARY])),
        "min_p": data.draw(st.sampled_from([0.0, 0.1])),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 1.3])),
        "presence_penalty": data.draw(st.sampled_from([0.0, 0.8])),
    }
    rows = logits(seed % 1000, rows=company + 1)
    alone = draw(start(seed=seed, choice=choice, **params), rows[company])
    sampler = Sampler()
    for index in range(company):
        sampler.start(start(100 + index, seed=index, temperature=1.5, top_p=0.8))
    sampler.start(start(1, seed=seed, choice=choice, **params))
    together = sampler.sample([*range(100, 100 + company), 1], rows)
    assert together[-1].token_id == alone


def test_resuming_from_emitted_tokens_continues_the_same_draws() -> None:
    rows = logits(5, rows=12)
    whole = Sampler()
    whole.start(start(frequency_penalty=0.5, repetition_penalty=1.2))
    tokens = [whole.sample([1], rows[i : i + 1])[0].token_id for i in range(12)]
    for cut in (1, 5, 11):
        resumed = Sampler()
        resumed.start(start(emitted=tokens[:cut], frequency_penalty=0.5, repetition_penalty=1.2))
        assert [resumed.sample([1], rows[i : i + 1])[0].token_id for i in range(cut, 12)] == tokens[cut:]


def test_seed_choice_and_position_each_matter() -> None:
    row = torch.zeros(VOCABULARY)
    assert len({draw(start(seed=seed), row) for seed in range(30)}) > 10
    assert len({draw(start(choice=choice), row) for choice in range(30)}) > 10
    assert len({draw(start(prompt=(1,) * n), row) for n in range(1, 30)}) > 10


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 3}, 3),
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.81}, 3),
        ({"min_p": 0.5}, 2),
        ({"top_k": 1, "top_p": 0.99}, 1),
        ({"top_p": 0.999999}, 8),
    ],
)
def test_truncation_keeps_only_the_best(params: dict, allowed: int) -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.0078125])
    drawn = {draw(start(seed=seed, **params), probabilities.log()) for seed in range(600)}
    assert drawn <= set(range(allowed))
    assert len(drawn) == allowed or allowed == 8


def test_penalties_and_bias_change_the_choice_as_documented() -> None:
    row = torch.tensor([1.0, 2.0, 3.0, 2.9])
    assert draw(start(prompt=(0,), temperature=0.0, logit_bias={0: 5.0}), row) == 0
    assert draw(start(prompt=(0,), temperature=0.0, logit_bias={2: -100.0}), row) == 3
    assert draw(start(prompt=(2,), temperature=0.0, presence_penalty=2.0), row) == 2, "the prompt is not penalized"
    assert draw(start(prompt=(0,), emitted=(2,), temperature=0.0, presence_penalty=0.2), row) == 3
    assert draw(start(prompt=(0,), emitted=(2, 2), temperature=0.0, frequency_penalty=0.06), row) == 3
    assert draw(start(prompt=(2,), temperature=0.0, repetition_penalty=1.5), row) == 3, "the prompt counts here"


def test_minimum_length_forbids_every_stop_token_until_reached() -> None:
    row = torch.tensor([0.0, 1.0, 9.0, 5.0, 3.0])
    params = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (3,)}
    assert draw(start(prompt=(0,), **params), row) == 4
    assert draw(start(prompt=(0,), emitted=(4,), **params), row) == 4
    assert draw(start(prompt=(0,), emitted=(4, 4), **params), row) == 2


def test_logprobs_are_of_the_models_own_distribution() -> None:
    row = logits()[0]
    sampler = Sampler()
    sampler.start(start(logprobs=3, temperature=0.3, logit_bias={7: 100.0}))
    sample = sampler.sample([1], row[None])[0]
    expected = torch.log_softmax(row, -1)
    assert sample.token_id == 7
    assert sample.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    best = expected.topk(3)
    assert [token for token, _ in sample.top] == best.indices.tolist()
    assert all(math.isclose(a, b, abs_tol=1e-5) for (_, a), b in zip(sample.top, best.values.tolist(), strict=True))


def test_a_sequence_that_was_never_started_is_an_error() -> None:
    with pytest.raises(KeyError):
        Sampler().sample([5], logits())


def numbers(seed: int, choice: int, first_position: int, count: int) -> list[float]:
    """The first number of each position's own counter, as the sampler promises them for ever."""
    key = np.array((seed % 2**64, choice), dtype=np.uint64)
    positions = range(first_position, first_position + count)
    return [float(np.random.Philox(key=key, counter=p).random_raw() >> 11) * 2.0**-53 for p in positions]


@pytest.mark.parametrize(("seed", "choice"), [(0, 0), (11, 3), (-5, 1), (2**63 - 1, 0)])
def test_the_numbers_depend_on_seed_choice_and_position_alone(seed: int, choice: int) -> None:
    row = SequenceSampler(start(prompt=(1, 2, 3), seed=seed, choice=choice))
    drawn = []
    for position in range(12):
        if position % 3:  # positions at which nothing was drawn do not shift those after them
            drawn.append((position, row.uniform()))
        row.append(4)
    expected = numbers(seed, choice, 3, 12)
    assert drawn == [(position, expected[position]) for position, _ in drawn]
    assert numbers(11, 0, 5, 2) == [0.16776829487128186, 0.891564760784155]


@settings(deadline=None, max_examples=100)
@given(
    size=st.sampled_from([1, 7, 255, 256, 257, 1000]),
    logits_seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([None, 1, 3, 200]),
    min_p=st.sampled_from([0.0, 0.05]),
)
def test_a_draw_is_the_inverse_transform_of_the_truncated_distribution(
    size: int, logits_seed: int, temperature: float, top_p: float, top_k: int | None, min_p: float
) -> None:
    row = np.random.default_rng(logits_seed).normal(scale=3.0, size=size).astype(np.float32)
    weights = np.exp((row.astype(np.float64) - row.max()) / temperature)
    order = np.argsort(-weights)
    kept = [i for i in order if weights[i] >= min_p * weights.max()][: top_k or size]
    target = weights[kept].sum() * top_p
    num_kept = int(np.searchsorted(weights[kept].cumsum(), target)) + 1
    kept = sorted(kept[:num_kept])
    params = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    for seed in range(8):
        uniform = numbers(seed, 0, 2, 1)[0]
        cumulative = weights[kept].cumsum() / weights[kept].sum()
        allowed = {kept[int(np.searchsorted(cumulative, u, side="right"))] for u in (uniform - 1e-6, uniform + 1e-6)}
        assert draw(start(seed=seed, **params), torch.from_numpy(row)) in allowed


def test_a_draw_that_rounds_to_the_end_is_the_last_token_of_some_probability() -> None:
    logits_V = torch.full((600,), -torch.inf)
    logits_V[[3, 290]] = 0.0
    drawn = {draw(start(seed=seed), logits_V) for seed in range(40)}
    assert drawn == {3, 290}
    assert _first_above(np.array([0.5, 1.0, 1.0]), 1.0) == 1


def test_plain_rows_and_others_of_one_step_do_not_disturb_each_other() -> None:
    rows = logits(3, rows=3)
    sampler = Sampler()
    sampler.start(start(1, temperature=0.0))
    sampler.start(start(2, temperature=0.0, logit_bias={9: 100.0}))
    sampler.start(start(3, temperature=0.0, logprobs=1))
    samples = sampler.sample([1, 2, 3], rows)
    best = rows.argmax(-1).tolist()
    assert [sample.token_id for sample in samples] == [best[0], 9, best[2]]
    assert [sample.logprob is None for sample in samples] == [True, True, False]
