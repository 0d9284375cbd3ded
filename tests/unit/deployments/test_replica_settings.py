"""What changes in place: a request's time in the replica, and when a replica is added."""

from types import SimpleNamespace

import pytest

from cluster.plan.build import build_plan
from cluster.plan.types import ReplicaSettings
from deployments.messages import Embed
from deployments.replica.autoscale import WaitingTokensPolicy
from deployments.replica.service import engine_config, within
from tests.unit.cluster.plan_examples import SMOLLM2, config, known

SETTINGS = ReplicaSettings(target_waiting_tokens=100, request_timeout_s=30.0, step_timeout_s=9.0, drain_timeout_s=5.0)


@pytest.mark.parametrize(("asked", "given"), [(10.0, 10.0), (30.0, 30.0), (600.0, 30.0)])
def test_a_request_lives_no_longer_than_the_model_allows(asked, given):
    request = Embed(request_id="r", inputs=("text",), deadline_s=asked)
    assert within(request, SETTINGS).deadline_s == given
    assert within(request, None) is request


def test_the_engine_has_the_limits_that_the_config_says():
    batching = {"max_running": 5, "max_step_tokens": 77, "max_waiting": 9, "speculative_tokens": 3, "steps_ahead": 1}
    kv_cache = {"tokens": 4096, "block_tokens": 32, "prefix_caching": False}
    models = SMOLLM2.replace("{stages: 2}", f"{{stages: 2}}\n    batching: {batching}\n    kv_cache: {kv_cache}")
    plan = build_plan(config(models), {"smollm2": known()}, "digest")
    limits = engine_config(plan.models[0].args)
    assert {name: getattr(limits, name) for name in batching} == batching
    assert (limits.block_tokens, limits.num_blocks, limits.prefix_caching) == (32, 4096 // 32, False)


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
