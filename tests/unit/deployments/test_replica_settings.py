"""What changes in place: a request's time in the replica, and when a replica is added."""

from types import SimpleNamespace

import pytest

from cluster.plan.types import ReplicaSettings
from deployments.messages import Embed
from deployments.replica.autoscale import WaitingTokensPolicy
from deployments.replica.service import within

SETTINGS = ReplicaSettings(target_waiting_tokens=100, request_timeout_s=30.0, step_timeout_s=9.0, drain_timeout_s=5.0)


@pytest.mark.parametrize(("asked", "given"), [(10.0, 10.0), (30.0, 30.0), (600.0, 30.0)])
def test_a_request_lives_no_longer_than_the_model_allows(asked, given):
    request = Embed(request_id="r", inputs=("text",), deadline_s=asked)
    assert within(request, SETTINGS).deadline_s == given
    assert within(request, None) is request


@pytest.mark.parametrize(
    ("waiting", "current", "wanted"),
    [([0.5], 1, 1), ([1.01], 1, 2), ([3.5], 1, 4), ([0.9, 0.9], 2, 2), ([0.0, 2.1], 2, 3)],
)
def test_replicas_are_added_while_more_waits_than_the_target_of_each(waiting, current, wanted):
    reports = {
        "waiting": dict(enumerate(waiting)),
        "running": dict.fromkeys(range(current), 1.0),
        "kv_used_fraction": dict.fromkeys(range(current), 0.9),
    }
    context = SimpleNamespace(
        current_num_replicas=current, target_num_replicas=current, total_num_requests=1, aggregated_metrics=reports
    )
    assert WaitingTokensPolicy()(context) == (wanted, {})
