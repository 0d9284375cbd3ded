"""Layers to stages: optimal against brute force, explicit splits, refusals."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import PlanError
from cluster.plan.partition import balance, cut_layers, explicit, layer_costs
from tests.unit.cluster.plan_examples import facts


def all_cuts(num_layers: int, num_stages: int) -> list[tuple[tuple[int, int], ...]]:
    cuts = []
    for inner in combinations(range(1, num_layers), num_stages - 1):
        bounds = (0, *inner, num_layers)
        cuts.append(tuple(pairwise(bounds)))
    return cuts


def score(costs: list[int], ranges: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    sums = [sum(costs[start:stop]) for start, stop in ranges]
    return max(sums), sum(value * value for value in sums)


@given(data=st.data(), costs=st.lists(st.integers(0, 50), min_size=1, max_size=9))
def test_balance_is_as_good_as_trying_every_cut(data, costs):
    num_stages = data.draw(st.integers(1, len(costs)))
    ranges = balance(costs, num_stages)
    assert score(costs, ranges) == min(score(costs, cut) for cut in all_cuts(len(costs), num_stages))
    assert ranges in all_cuts(len(costs), num_stages)


def test_equal_layers_are_shared_equally():
    assert balance([5] * 12, 3) == ((0, 4), (4, 8), (8, 12))


def test_the_output_head_makes_the_last_stage_shorter():
    tied = facts(num_layers=30, layer_params=3_540_000, embedding_params=28_311_552, tied_head=True)
    assert cut_layers(tied, 2, path="p") == ((0, 19), (19, 30))


def test_a_head_of_its_own_counts_too_and_an_embedding_model_has_none():
    untied = facts(num_layers=4, layer_params=10, embedding_params=1000, head_params=20, tied_head=False)
    assert layer_costs(untied) == (10, 10, 10, 30)
    assert layer_costs(facts(num_layers=4, layer_params=10, task="embed")) == (10, 10, 10, 10)


def test_a_written_split_is_taken_as_it_is():
    assert explicit([1, 3], facts(num_layers=4), path="p") == ((0, 1), (1, 4))


def test_a_split_that_is_not_all_layers_is_refused_with_both_numbers():
    with pytest.raises(PlanError, match=r"models\[0\]\.pipeline\.split: \[2, 3\] is 5 layers, but the model has 4"):
        explicit([2, 3], facts(num_layers=4), path="models[0].pipeline")


def test_more_stages_than_layers_are_refused_with_both_numbers():
    with pytest.raises(PlanError, match=r"p\.stages: 5 stages but only 4 layers; set stages to 4 or less"):
        cut_layers(facts(num_layers=4), 5, path="p")
    with pytest.raises(ValueError):
        balance([1, 2], 3)
