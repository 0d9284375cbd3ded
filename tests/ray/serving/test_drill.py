"""``manta drill`` against a real cluster: replicas and stages die under mixed streams, and nobody loses a token."""

import json
from typing import Any

import pytest

from tests.support.running import Cluster

TIMED = {"goodput is at least 90% of its peak", "refusals take under 100 ms (p99)"}
"""Promises about time, which a busy test machine may break."""


@pytest.fixture(scope="module")
def drilled(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Results by scenario, of one drill that plays them all."""
    words = ("kill-stage", "kill-all", "overload", "disconnect")
    options = ("--requests", "200", "--streams", "32", "--load", "4s", "--cycles", "200", "--yes", "--json")
    done = cluster.manta("drill", str(cluster.config), *words, *options, timeout_s=400)
    assert done.stdout, done.stderr
    return {result["scenario"]: result for result in json.loads(done.stdout)["scenarios"]}


def broken(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [promise for promise in result["promises"] if not promise["kept"] and promise["text"] not in TIMED]


@pytest.mark.parametrize("scenario", ["kill-stage", "kill-all"])
def test_streams_survive(drilled: dict[str, dict[str, Any]], scenario: str) -> None:
    result = drilled[scenario]
    assert broken(result) == []
    assert result["num_requests"] >= 200
    assert (result["num_failed"], result["num_changed"]) == (0, 0)
    assert result["gap_max_s"] >= result["gap_p50_s"] > 0
    assert result["recover_s"] > 0


def test_an_overload_leaves_no_request_without_an_end(drilled: dict[str, dict[str, Any]]) -> None:
    result = drilled["overload"]
    assert broken(result) == []
    assert result["num_failed"] > 0, "refused with 429"


def test_clients_that_leave_hold_nothing(drilled: dict[str, dict[str, Any]]) -> None:
    assert broken(drilled["disconnect"]) == []
    assert "200 connections dropped" in drilled["disconnect"]["notes"][0]


def test_the_drill_left_the_cluster_as_it_was(drilled: dict[str, dict[str, Any]], cluster: Cluster) -> None:
    assert drilled
    assert "nothing" in cluster.up().lower()
