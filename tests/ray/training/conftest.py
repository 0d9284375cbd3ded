"""One Ray of two nodes for these files, which this process is a driver of."""

from collections.abc import Iterator

import pytest

from tests.support.raylets import Raylets


@pytest.fixture(scope="package")
def raylets() -> Iterator[Raylets]:
    """Nodes ``a``, the head, and ``b`` take a worker each."""
    raylets = Raylets()
    try:
        raylets.start_head(1, train_slot=1, a=1)
        raylets.add_node(1, train_slot=1, b=1)
        raylets.connect()
        yield raylets
    finally:
        raylets.stop()
