"""The parameter server's decisions: no gradient is too old, none waits for ever, every batch is applied once."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_jobs.trainer.strategies.staleness import Handout, Handouts


@given(
    data=st.data(),
    num_workers=st.integers(1, 6),
    max_staleness=st.none() | st.integers(0, 7),
    stops=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    first=st.integers(0, 5),
)
def test_no_order_of_arrivals_breaks_the_bound_or_stalls(
    data: st.DataObject, num_workers: int, max_staleness: int | None, stops: list[int], first: int
) -> None:
    handouts = Handouts(first=first, max_staleness=max_staleness)
    free, computing = list(range(num_workers)), dict[int, Handout]()
    applied: list[int] = []
    for stop in (first + sum(stops[: number + 1]) for number in range(len(stops))):
        while first + len(applied) < stop:
            for worker in list(free):
                handout = handouts.hand_out(worker, stop)
                if handout is not None:
                    assert (handout.worker, handout.pulled) == (worker, first + len(applied))
                    computing[worker] = handout
                    free.remove(worker)
            if max_staleness is not None:
                assert handouts.num_under_way <= max_staleness + 1
            if (found := handouts.apply()) is not None:
                handout, staleness = found
                assert staleness == first + len(applied) - handout.pulled
                assert max_staleness is None or staleness <= max_staleness
                applied.append(handout.item)
                free.append(handout.worker)
                continue
            arriving = data.draw(st.sampled_from(sorted(computing)))  # empty where all wait: a deadlock
            del computing[arriving]
            handouts.arrived(arriving)
        assert handouts.num_under_way == 0
        assert sorted(applied) == list(range(first, stop))


def test_without_a_bound_a_gradient_is_applied_when_it_arrives() -> None:
    handouts = Handouts(first=0, max_staleness=None)
    slow = handouts.hand_out(1, 100)
    assert slow == Handout(item=0, worker=1, pulled=0)
    for item in range(1, 10):
        assert handouts.hand_out(2, 100) == Handout(item=item, worker=2, pulled=item - 1)
        handouts.arrived(2)
        assert handouts.apply() == (Handout(item=item, worker=2, pulled=item - 1), 0)
    handouts.arrived(1)
    assert handouts.apply() == (slow, 9)


def test_a_fast_worker_is_held_until_the_slow_one_is_in_time() -> None:
    handouts = Handouts(first=0, max_staleness=1)
    slow, fast = handouts.hand_out(1, 100), handouts.hand_out(2, 100)
    assert handouts.hand_out(3, 100) is None
    handouts.arrived(2)
    assert handouts.apply() == (fast, 0)
    again = handouts.hand_out(2, 100)
    handouts.arrived(2)
    assert handouts.apply() is None
    handouts.arrived(1)
    assert handouts.apply() == (slow, 1)
    assert handouts.apply() == (again, 1)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_bound_0_is_one_after_the_other(num_workers: int) -> None:
    handouts = Handouts(first=0, max_staleness=0)
    order = []
    for item in range(6):
        given_out = [handouts.hand_out(worker, 6) for worker in range(num_workers)]
        assert given_out == [Handout(item=item, worker=0, pulled=item)] + [None] * (num_workers - 1)
        handouts.arrived(0)
        found = handouts.apply()
        assert found is not None
        order.append(found[0].item)
    assert all(after == before + 1 for before, after in pairwise(order))
