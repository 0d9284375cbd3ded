"""A replica dies or leaves, or a stage hangs, under mixed seeded streams: they go on with the same tokens.

Killing every replica at once, so that streams wait for the next one, is in ``test_drill.py``.
"""

import json
from typing import Any

import pytest

from tests.support.running import Cluster

pytestmark = pytest.mark.timeout(600)
"""A busy machine may take three times what a quiet one needs."""

SCENARIOS = ("stop-stage", "kill-replica", "scale-down")
NUM_REQUESTS = 48


@pytest.fixture(scope="module")
def drilled(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Results by scenario, of one drill that plays them all."""
    options = ("--requests", str(NUM_REQUESTS), "--streams", "16", "--yes", "--json")
    done = cluster.manta("drill", str(cluster.config), *SCENARIOS, *options, timeout_s=400)
    assert done.stdout, done.stderr
    results = {result["scenario"]: result for result in json.loads(done.stdout)["scenarios"]}
    assert results, done.stderr
    return results


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_stream_is_lost_or_changed(drilled: dict[str, dict[str, Any]], scenario: str) -> None:
    result = drilled[scenario]
    assert [promise for promise in result["promises"] if not promise["kept"]] == []
    assert result["num_requests"] >= NUM_REQUESTS
    assert (result["num_failed"], result["num_changed"]) == (0, 0)
    assert result["gap_max_s"] > 0, "streams were open when it happened"
