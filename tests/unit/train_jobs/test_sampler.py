"""The order of items: every item once an epoch, a function of seed and cursor alone, well mixed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_jobs.data.sampler import Order


@pytest.mark.parametrize("num_items", [1, 2, 3, 5, 16, 17, 100, 255, 1000, 4097])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_visits_every_item_once(num_items: int, epoch: int) -> None:
    items = Order(num_items, 3).batch(epoch * num_items, num_items)
    assert sorted(items) == list(range(num_items))


@settings(max_examples=40)
@given(
    num_items=st.integers(1, 5000),
    seed=st.integers(-(2**70), 2**70),
    cursor=st.integers(0, 2**40),
    count=st.integers(0, 60),
)
def test_a_batch_is_the_items_at_its_positions(num_items: int, seed: int, cursor: int, count: int) -> None:
    order = Order(num_items, seed)
    batch = order.batch(cursor, count)
    assert batch.shape == (count,)
    assert list(batch) == [order.at(cursor + offset) for offset in range(count)]


def test_batches_of_any_size_make_the_same_sequence() -> None:
    whole = Order(97, 5).batch(0, 400)
    for size in (1, 7, 32, 200):
        parts = [Order(97, 5).batch(start, size) for start in range(0, 400, size)]
        assert list(np.concatenate(parts)[:400]) == list(whole)


def test_epochs_and_seeds_differ() -> None:
    order = Order(1000, 0)
    first, second = order.batch(0, 1000), order.batch(1000, 1000)
    other = Order(1000, 1).batch(0, 1000)
    for one, two in [(first, second), (first, other), (first, np.arange(1000))]:
        assert np.mean(one == two) < 0.02


def test_the_order_never_changes_between_releases() -> None:
    """A run resumes by its cursor alone, so these numbers are for ever."""
    assert Order(10, 0).batch(0, 20).tolist() == [0, 9, 1, 2, 6, 7, 3, 8, 4, 5, 0, 3, 1, 7, 9, 6, 5, 4, 8, 2]
    assert Order(1_000_003, 42).batch(999_999, 6).tolist() == [319004, 971635, 826377, 574725, 761521, 742231]


@pytest.mark.parametrize("num_items", [5, 8, 24])
def test_every_item_is_as_likely_at_every_position(num_items: int) -> None:
    """Chi-squared over the items at one position in many epochs, for a few positions."""
    order, num_epochs = Order(num_items, 11), 30 * num_items
    for position in (0, num_items // 2, num_items - 1):
        seen = [order.at(epoch * num_items + position) for epoch in range(num_epochs)]
        expected = num_epochs / num_items
        chi_squared = float(((np.bincount(seen, minlength=num_items) - expected) ** 2 / expected).sum())
        degrees = num_items - 1
        assert abs(chi_squared - degrees) < 4 * np.sqrt(2 * degrees)


def test_neighbours_do_not_stay_together() -> None:
    items = Order(10_000, 2).batch(0, 10_000)
    distance = np.abs(np.diff(items))
    assert 3000 < distance.mean() < 3700, "random permutations have a third of the range"
    correlation = np.corrcoef(items[:-1], items[1:])[0, 1]
    assert abs(correlation) < 0.05


def test_nothing_to_order_is_refused() -> None:
    with pytest.raises(ValueError, match="num_items is 0"):
        Order(0, 1)
    with pytest.raises(ValueError, match="must not be negative"):
        Order(3, 1).batch(-1, 2)
