"""Adapters in the YAML: routes to their base's replicas, memory, and what cannot be beside what."""

import pytest

from cluster.control.served import references_of
from cluster.control.tables import plan_view
from cluster.errors import PlanError
from cluster.plan.build import build_plan
from cluster.plan.diff import Observed, ObservedApp, diff, routing_between
from cluster.plan.serve_app import NO_PROXIES, gateway_app, model_apps
from cluster.plan.types import AdapterFacts, KnownVersion, Plan
from tests.unit.cluster.plan_examples import MINILM, SMOLLM2, config, known, minilm_facts

BESIDE = SMOLLM2 + (
    "    adapters:\n"
    "      - {name: dialogs, source: 'registry://dialogs@latest'}\n"
    "      - {name: poems, source: 'registry://poetry@v4'}\n"
)


def adapter(name: str, version: str = "v1", of: str = "smollm2@v1", kind: str = "lora") -> KnownVersion:
    facts = AdapterFacts(of=of, kind=kind, num_params=3_000_000)
    return known(version).model_copy(update={"name": name, "adapter": facts, "created": 1_800_000_000})


VERSIONS = {"smollm2": known(), "dialogs": adapter("dialogs"), "poems": adapter("poetry", "v4")}


def planned(**changes: KnownVersion) -> Plan:
    return build_plan(config(BESIDE), VERSIONS | changes, "digest")


def test_they_share_the_application_of_their_base():
    plan = planned()
    (args,) = (model.args for model in plan.models)
    assert [(one.name, one.model, one.version) for one in args.adapters] == [
        ("dialogs", "dialogs", "v1"),
        ("poems", "poetry", "v4"),
    ]
    routes = {route.model: route for route in plan.routing.routes}
    assert [(route.model, route.parent, route.adapter) for route in plan.routing.routes] == [
        ("smollm2", None, None),
        ("dialogs", "smollm2", "dialogs"),
        ("poems", "smollm2", "poems"),
    ]
    assert routes["dialogs"].targets == routes["smollm2"].targets
    assert routes["dialogs"].created == 1_800_000_000
    assert len(model_apps(plan)) == 1


@pytest.mark.parametrize("quantization", ["", "    quantization: int4\n"])
def test_their_memory_is_counted_in_float32(quantization: str):
    plan, without = (build_plan(config(m + quantization), VERSIONS, "digest") for m in (BESIDE, SMOLLM2))
    sizes = [sum(stage.weight_bytes for stage in p.models[0].args.stages) for p in (plan, without)]
    assert sizes[0] - sizes[1] == pytest.approx(2 * 4 * 3_000_000, rel=0.001)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dialogs": known()}, r"adapters\.dialogs\.source: smollm2@v1 is a whole model"),
        ({"poems": adapter("poetry", of="smollm2@v2")}, r"adapts smollm2@v2, but smollm2 is smollm2@v1; .*@v2\)"),
        (
            {"dialogs": adapter("dialogs", kind="dora")},
            r"is a dora, .*\{name: dialogs, source: registry://dialogs@lat",
        ),
        ({"smollm2": adapter("smollm2", of="base@v1")}, r"smollm2 is an adapter itself, merged; list dialogs beside"),
    ],
)
def test_what_cannot_be_beside_the_base_is_refused(changes: dict, words: str):
    with pytest.raises(PlanError, match=words):
        planned(**changes)


def running(plan: Plan) -> Observed:
    configs = [*model_apps(plan), gateway_app(plan.gateway, plan.routing, plan.runtime_env)]
    apps = {
        app["name"]: ObservedApp(name=app["name"], status="RUNNING", config=app, num_running_replicas=1)
        for app in configs
    }
    return Observed(ray_running=True, proxies=NO_PROXIES, apps=apps)


def test_a_new_version_of_an_adapter_updates_its_base_and_routes_wait_for_that():
    old, new = planned(), planned(dialogs=adapter("dialogs", "v2"))
    assert [action.kind for action in diff(new, running(old))] == ["deploy_apps", "await_apps"]
    without = build_plan(config(SMOLLM2), VERSIONS, "digest")
    assert [action.kind for action in diff(old, running(without))] == ["deploy_apps", "await_apps", "switch_routes"]
    for_now = routing_between(old, running(without), (), ("smollm2",))
    assert [route.model for route in for_now.routes] == ["smollm2"]


def test_what_runs_keeps_the_adapters_versions():
    plan = build_plan(config(BESIDE + MINILM), VERSIONS | {"minilm": known("v3", minilm_facts())}, "digest")
    apps = {app["name"]: {"deployed_app_config": app} for app in model_apps(plan)}
    assert references_of({"applications": apps}) == {"smollm2@v1", "smollm2@v3", "dialogs@v1", "poetry@v4"}


def test_a_person_sees_them():
    lines = [str(part) for part in plan_view(planned(), []).renderables]
    assert "  and its adapter poems from registry://poetry@v4" in lines
