"""The statistics of the benchmarks: percentiles, windows, ratios, goals."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.figures import GOALS, QUANTIZED, Record, figures, goals_for, latency, percentile, ratio


def test_percentiles_interpolate_between_neighbours():
    values = [4.0, 1.0, 3.0, 2.0]
    assert percentile(values, 0) == 1.0
    assert percentile(values, 0.5) == 2.5
    assert percentile(values, 1) == 4.0
    assert percentile([7.0], 0.99) == 7.0


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50), st.floats(0, 1), st.floats(0, 1))
def test_percentiles_lie_between_the_extremes_and_grow_with_the_fraction(values, one, other):
    low, high = sorted((one, other))
    tolerance = 1e-9 * max(values)
    assert min(values) <= percentile(values, low) + tolerance
    assert percentile(values, low) <= percentile(values, high) + tolerance
    assert percentile(values, high) <= max(values) + tolerance
    assert percentile(values, 0.5) == pytest.approx(statistics.median(values))


@pytest.mark.parametrize(("values", "fraction"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
def test_a_percentile_of_nothing_or_beyond_the_ends_is_refused(values, fraction):
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, fraction)


def test_only_what_arrives_in_the_window_counts():
    record = Record(sent_s=9.0, event_times=[9.5, 10.0, 11.0, 12.0, 13.0], num_tokens=5, num_prompt_tokens=3)
    found = figures([record], 10.0, 12.0)
    assert found.tokens_per_s == 1.0  # 10.0 and 11.0; the window is half open
    assert found.first_token is None  # the first token came before it
    assert found.gap.count == 2  # gaps that end at 10.0 and at 11.0
    assert found.gap.p50_ms == pytest.approx(750)


def test_the_first_token_counts_where_it_arrives_not_where_it_was_sent():
    late = Record(sent_s=1.0, event_times=[5.0])
    found = figures([late], 4.0, 6.0)
    assert found.first_token.p50_ms == pytest.approx(4000)
    assert found.num_done == 0


def test_tokens_of_coalesced_events_are_spread_over_them_and_a_cut_request_takes_the_mean():
    whole = Record(sent_s=0.0, event_times=[1.0, 2.0], num_tokens=8)
    cut = Record(sent_s=0.0, event_times=[1.5])
    found = figures([whole, cut], 0.0, 2.0)
    assert found.tokens_per_event == 4.0
    assert found.tokens_per_s == (4 + 4) / 2


def test_failed_requests_are_counted_and_told_but_add_no_tokens():
    found = figures(
        [Record(sent_s=0.0, event_times=[0.5], error="gone"), Record(sent_s=0.0, error="other")], 0.0, 1.0
    )
    assert (found.num_errors, found.first_error, found.tokens_per_s) == (2, "gone", 0.0)


def test_prompt_lengths_are_reported_as_least_and_most():
    records = [Record(sent_s=0, event_times=[1], num_tokens=1, num_prompt_tokens=n) for n in (128, 130, 129)]
    assert figures(records, 0, 2).num_prompt_tokens == (128, 130)


def test_no_latency_of_nothing():
    assert latency([]) is None


def test_a_ratio_is_told_by_median_and_extremes_of_the_repeats():
    found = ratio([10.0, 30.0, 20.0], [10.0, 10.0, 40.0])
    assert (found.value, found.lowest, found.highest) == (1.0, 0.5, 3.0)


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_ratios_without_a_partner_are_refused(ours, theirs):
    with pytest.raises(ValueError, match=r"set against|no ratio"):
        ratio(ours, theirs)


def test_a_goal_on_speed_is_a_floor_and_one_on_latency_a_ceiling():
    speed = next(goal for goal in GOALS if goal.measure == "tok/s")
    wait = next(goal for goal in GOALS if goal.measure == "TTFT p50")
    assert speed.met(speed.bound)
    assert not speed.met(speed.bound - 0.01)
    assert wait.met(wait.bound)
    assert not wait.met(wait.bound + 0.01)


def test_one_stream_has_a_goal_of_its_own_for_quantized_weights():
    assert [goal.bound for goal in goals_for("W1", "vllm", "bf16")] == [2.0]
    for weights in QUANTIZED:
        assert [goal.bound for goal in goals_for("W1", "vllm", weights)] == [3.5]
        assert [goal.bound for goal in goals_for("W1", "llama.cpp", weights)] == [1.0]
    assert goals_for("W1", "llama.cpp", "bf16") == []


def test_long_prompts_have_a_goal_on_the_first_token_too():
    assert {goal.measure for goal in goals_for("W6", "vllm", "bf16")} == {"tok/s", "TTFT p50"}
