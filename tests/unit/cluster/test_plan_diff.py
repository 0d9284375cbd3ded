"""Dictionaries in, dictionaries out: what runs and what should, and the actions between them."""

import pytest

from cluster.errors import PlanError
from cluster.plan.build import build_plan
from cluster.plan.diff import Observed, ObservedApp, diff, join, routing_for_now
from cluster.plan.serve_app import NO_PROXIES, gateway_app, model_apps
from cluster.plan.types import Plan
from tests.unit.cluster.plan_examples import MINILM, SMOLLM2, config, known, minilm_facts


def plan(version: str = "v1", models: str = SMOLLM2, digest: str = "digest", memory: str = "8GiB") -> Plan:
    nodes = f"    - {{name: box, resources: {{CPU: 2, memory: {memory}}}}}\n"
    versions = {"smollm2": known(version), "minilm": known(model_facts=minilm_facts())}
    return build_plan(config(models, nodes), versions, digest)


def running(source: Plan, **statuses: str) -> Observed:
    """The cluster as ``up`` leaves it for ``source``, with other statuses for some applications."""
    configs = [*model_apps(source), gateway_app(source.gateway, source.routing, source.runtime_env)]
    apps = {}
    for app in configs:
        status = statuses.get(app["name"].replace("-", "_"), "RUNNING")
        apps[app["name"]] = ObservedApp(
            name=app["name"], status=status, config=app, num_running_replicas=int(status == "RUNNING")
        )
    return Observed(ray_running=True, proxies=NO_PROXIES, apps=apps)


def kinds(wanted: Plan, observed: Observed) -> list[tuple[object, ...]]:
    return [(action.kind, *getattr(action, "apps", ())) for action in diff(wanted, observed)]


STOPPED = Observed(ray_running=False)
FIRST_TIME = [
    ("deploy_apps", "smollm2-v1", "gateway"),
    ("await_apps", "smollm2-v1", "gateway"),
    ("switch_routes",),
]


def test_from_nothing():
    assert kinds(plan(), STOPPED) == [("start_cluster",), *FIRST_TIME]


def test_ray_without_serve():
    assert kinds(plan(), Observed(ray_running=True)) == FIRST_TIME


def test_nothing_changed():
    (only,) = diff(plan(), running(plan()))
    assert only.sentence == "Nothing to do: everything is as the config says."


def test_a_new_version_is_up_before_the_old_one_goes():
    assert kinds(plan("v2"), running(plan("v1"))) == [
        ("deploy_apps", "smollm2-v2"),
        ("await_apps", "smollm2-v2"),
        ("switch_routes",),
        ("remove_apps", "smollm2-v1"),
    ]


def test_without_room_for_both_the_old_version_goes_first():
    tight = "1GiB"
    assert kinds(plan("v2", memory=tight), running(plan("v1", memory=tight))) == [
        ("remove_apps", "smollm2-v1"),
        ("deploy_apps", "smollm2-v2"),
        ("await_apps", "smollm2-v2"),
        ("switch_routes",),
    ]


def test_changed_arguments_update_the_application_in_place():
    more = SMOLLM2.replace("stages: 2", "stages: 3")
    assert kinds(plan(models=more), running(plan())) == [
        ("deploy_apps", "smollm2-v1"),
        ("await_apps", "smollm2-v1"),
    ]


@pytest.mark.parametrize("line", ["quantization: int8", "kernels: torch"])
def test_quantization_and_kernels_restart_the_replicas(line):
    assert kinds(plan(models=f"{SMOLLM2}    {line}\n"), running(plan())) == [
        ("deploy_apps", "smollm2-v1"),
        ("await_apps", "smollm2-v1"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "keys"),
    [
        ("max: 2", "max: 3", "replicas.max"),
        (
            "max: 2",
            "max: 2, target_waiting_tokens: 9, upscale_delay: 9s",
            "replicas.upscale_delay and replicas.target_",
        ),
        ("replicas", "timeouts: {request: 90s}\n    replicas", "timeouts.drain and timeouts.request"),
        ("replicas", "timeouts: {step: 9s}\n    replicas", "timeouts.step"),
        ("replicas", "timeouts: {drain: 90s}\n    replicas", "timeouts.drain"),
    ],
)
def test_bounds_and_timeouts_change_in_place(old, new, keys):
    wanted = plan(models=SMOLLM2.replace(old, new))
    change, wait = diff(wanted, running(plan()))
    assert (change.kind, change.apps) == ("change_settings", ("smollm2-v1",))
    assert change.sentence.startswith(f"Change {keys}")
    assert change.sentence.endswith(" of smollm2-v1 in place.")
    assert (wait.kind, wait.apps) == ("await_apps", ("smollm2-v1",))
    assert kinds(wanted, running(wanted)) == [("nothing",)]


def test_no_room_for_two_versions_is_no_reason_to_stop_a_model_whose_bounds_change():
    wanted = plan(models=SMOLLM2.replace("max: 2", "max: 3"), memory="1GiB")
    assert not wanted.surge
    assert kinds(wanted, running(plan(memory="1GiB")))[0] == ("change_settings", "smollm2-v1")


def test_new_arguments_take_new_bounds_along():
    both = SMOLLM2.replace("stages: 2", "stages: 3").replace("max: 2", "max: 3")
    assert [kind for kind, *_ in kinds(plan(models=both), running(plan()))] == ["deploy_apps", "await_apps"]


TWINS = SMOLLM2 + SMOLLM2.replace("smollm2", "other", 1).replace("source: wheel://llm-", "source: wheel://my-")


def twins(version: str, memory: str, digest: str = "digest") -> Plan:
    """Two models that need 733 MiB each."""
    nodes = f"    - {{name: box, resources: {{CPU: 2, memory: {memory}}}}}\n"
    versions = {name: known(version).model_copy(update={"name": name}) for name in ("smollm2", "other")}
    return build_plan(config(TWINS, nodes), versions, digest)


def test_two_new_versions_take_turns_where_there_is_room_for_one():
    assert kinds(twins("v2", "2400MiB"), running(twins("v1", "2400MiB"))) == [
        ("deploy_apps", "smollm2-v2"),
        ("await_apps", "smollm2-v2"),
        ("switch_routes",),
        ("remove_apps", "smollm2-v1"),
        ("deploy_apps", "other-v2"),
        ("await_apps", "other-v2"),
        ("switch_routes",),
        ("remove_apps", "other-v1"),
    ]


def test_two_new_versions_go_together_where_there_is_room_for_both():
    assert kinds(twins("v2", "4GiB"), running(twins("v1", "4GiB"))) == [
        ("deploy_apps", "smollm2-v2", "other-v2"),
        ("await_apps", "smollm2-v2", "other-v2"),
        ("switch_routes",),
        ("remove_apps", "smollm2-v1", "other-v1"),
    ]


def test_changed_code_replaces_one_model_after_the_other_where_there_is_room_for_one():
    assert kinds(twins("v1", "2400MiB", digest="other"), running(twins("v1", "2400MiB"))) == [
        ("deploy_apps", "smollm2-v1", "gateway"),
        ("await_apps", "smollm2-v1", "gateway"),
        ("deploy_apps", "other-v1"),
        ("await_apps", "other-v1"),
    ]


def test_the_first_deployment_of_two_models_needs_no_turns():
    assert kinds(twins("v1", "2400MiB"), STOPPED)[1] == ("deploy_apps", "smollm2-v1", "other-v1", "gateway")


def test_changed_code_updates_everything():
    assert kinds(plan(digest="other"), running(plan())) == [
        ("deploy_apps", "smollm2-v1", "gateway"),
        ("await_apps", "smollm2-v1", "gateway"),
    ]


def test_changed_limits_touch_only_the_routing_table():
    wanted = plan()
    settings = wanted.routing.settings.model_copy(update={"max_choices": 1})
    routing = wanted.routing.model_copy(update={"settings": settings})
    assert kinds(wanted.model_copy(update={"routing": routing}), running(plan())) == [("switch_routes",)]


def test_a_model_that_is_no_longer_wanted_goes_after_its_route():
    assert kinds(plan(), running(plan(models=SMOLLM2 + MINILM))) == [
        ("switch_routes",),
        ("remove_apps", "minilm-v1"),
    ]


def test_an_interrupted_up_is_waited_for_and_finished():
    halfway = running(plan(), smollm2_v1="DEPLOYING")
    assert kinds(plan(), halfway) == [("await_apps", "smollm2-v1")]


def test_a_failed_application_is_removed_and_tried_again():
    assert kinds(plan(), running(plan(), smollm2_v1="DEPLOY_FAILED")) == [
        ("remove_apps", "smollm2-v1"),
        ("deploy_apps", "smollm2-v1"),
        ("await_apps", "smollm2-v1"),
        ("switch_routes",),
    ]


def test_a_failed_application_that_still_serves_is_not_taken_away():
    observed = running(plan(), smollm2_v1="DEPLOY_FAILED")
    app = observed.apps["smollm2-v1"]
    serving = ObservedApp(name=app.name, status=app.status, config=app.config, num_running_replicas=1)
    observed = Observed(ray_running=True, apps={**observed.apps, "smollm2-v1": serving})
    assert ("remove_apps", "smollm2-v1") not in kinds(plan(), observed)


def test_models_that_are_not_imported_come_first_and_do_not_remove_what_serves_them():
    wanted = build_plan(config(), {}, "digest")
    (action,) = diff(wanted, running(plan()))
    assert action.kind == "import_model"
    assert action.sentence == f"Import smollm2 from {wanted.models[0].source}."
    assert [kind for kind, *_ in kinds(wanted, STOPPED)][:2] == ["import_model", "start_cluster"]


def test_another_port_replaces_the_gateway_alone():
    moved = plan()
    moved = moved.model_copy(update={"gateway": moved.gateway.model_copy(update={"http_port": 8001})})
    assert kinds(moved, running(plan())) == [("deploy_apps", "gateway"), ("await_apps", "gateway")]


def test_a_ray_that_serves_a_cluster_of_another_name_is_refused_with_both_names():
    ours = plan().model_copy(update={"name": "ours"})
    with pytest.raises(
        PlanError, match=r"cluster ours: this Ray already serves cluster test, .*config of test first"
    ):
        diff(ours, running(plan()))


def test_a_gateway_that_does_not_say_whose_it_is_is_taken_over():
    observed = running(plan())
    del observed.apps["gateway"].config["args"]["cluster"]
    assert kinds(plan(), observed) == [("deploy_apps", "gateway"), ("await_apps", "gateway")]


def foreign(name: str, route: str | None) -> Observed:
    app = ObservedApp(
        name=name,
        status="RUNNING",
        config={"name": name, "import_path": "shop:app", "route_prefix": route, "args": {}},
    )
    return Observed(ray_running=True, apps={**running(plan()).apps, name: app})


@pytest.mark.parametrize("route", ["/shop", "/", None])
def test_applications_of_others_are_left_alone_and_repeated(route):
    observed = foreign("shop", route)
    assert kinds(plan(), observed) == [("nothing",)]
    assert [app["name"] for app in observed.foreign_configs()] == ["shop"]


def test_applications_of_others_in_our_way_are_refused():
    with pytest.raises(PlanError, match=r"already runs an application named gateway that Manta did not deploy"):
        diff(plan(), foreign("gateway", "/shop"))


def test_a_new_gateway_begins_without_routes_and_a_running_one_keeps_them():
    assert routing_for_now(plan(), STOPPED).routes == ()
    assert routing_for_now(plan("v2"), running(plan("v1"))) == plan("v1").routing
    assert routing_for_now(plan("v2"), running(plan("v1")), removed=["smollm2-v1"]).routes == ()


def test_routes_are_kept_from_a_gateway_of_another_release_with_other_limits():
    observed = running(plan("v1"))
    del observed.apps["gateway"].config["deployments"][0]["user_config"]["settings"]["max_choices"]
    assert routing_for_now(plan("v2", digest="newer"), observed) == plan("v1").routing


def test_names_are_joined_as_people_do():
    assert [join([]), join(["a"]), join(["a", "b"]), join(["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
