"""Sizes and times: what people write, and that writing a value and reading it gives the same value."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.units import exact_bytes, exact_seconds, format_bytes, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("8GiB", 2**33), ("500MB", 500_000_000), ("1.5KiB", 1536), (" 7 B ", 7), ("0B", 0)]
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30.0), ("200ms", 0.2), ("1.5h", 5400.0), ("1d", 86400.0)])
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "8", "GiB", "-1GiB", "8gib", "8 G", "1e3B", "1,5GiB", "9" * 500 + "B", "8GiB\n8"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a number with a unit|is too large"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "30", "30 sec", "-1s", "1:30", "inf s", "9" * 500 + "s"])
def test_no_times(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a number with a unit|is too large"):
        parse_seconds(text)


@given(st.integers(0, 2**62) | st.integers(0, 2**20).map(lambda number: number * 2**20))
def test_exact_size_is_read_back(num_bytes: int) -> None:
    assert parse_bytes(exact_bytes(num_bytes)) == num_bytes


@given(st.floats(0, 1e15, allow_subnormal=False))
def test_exact_time_is_read_back(seconds: float) -> None:
    assert parse_seconds(exact_seconds(seconds)) == seconds


def test_texts_are_the_ones_people_write() -> None:
    assert [exact_bytes(200 * 2**20), exact_bytes(1000), exact_bytes(0)] == ["200MiB", "1000B", "0B"]
    assert [exact_seconds(600.0), exact_seconds(0.25), exact_seconds(0)] == ["600s", "0.25s", "0s"]
    assert [format_bytes(12), format_bytes(1536), format_bytes(2**40)] == ["12B", "1.5KiB", "1024.0GiB"]
