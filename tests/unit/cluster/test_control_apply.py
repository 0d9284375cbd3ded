"""Carrying a plan out on a Serve that answers like Ray's: what it is told, when, and what failure leaves."""

from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest

from cluster.control.apply import apply_plan
from cluster.control.report import LineReport
from cluster.errors import ControlError
from cluster.plan.types import Plan
from tests.unit.cluster.plan_examples import SMOLLM2
from tests.unit.cluster.test_plan_diff import plan, twins


class FakeServe:
    """The dashboard of a Ray whose Serve runs every application at once, except those named in ``broken``."""

    url = "http://127.0.0.1:1"

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.broken: dict[str, str] = {}

    def put_applications(self, config: dict[str, Any]) -> None:
        self.bodies.append(config)

    def serve_details(self) -> dict[str, Any]:
        if not self.bodies:
            return {"controller_info": {}, "applications": {}}
        body = self.bodies[-1]
        return {
            "controller_info": {"node_id": "n"},
            "proxy_location": body["proxy_location"],
            "http_options": {"host": "0.0.0.0", "port": 8000},
            "applications": {app["name"]: self._details(app) for app in body["applications"]},
        }

    def _details(self, app: dict[str, Any]) -> dict[str, Any]:
        error = self.broken.get(app["name"])
        deployment = {
            "message": "" if error is None else f'Traceback\n  File "x.py", line 1\n{error}',
            "target_num_replicas": 1,
            "replicas": [] if error else [{"state": "RUNNING"}],
        }
        return {
            "name": app["name"],
            "status": "DEPLOY_FAILED" if error else "RUNNING",
            "message": "",
            "source": "declarative",
            "deployed_app_config": app,
            "deployments": {"Replica": deployment},
        }

    def routes(self) -> list[list[str]]:
        """Which applications the gateway routed to, body by body."""
        tables = []
        for body in self.bodies:
            for app in body["applications"]:
                if app["name"] == "gateway":
                    table = app["deployments"][0]["user_config"]["routes"]
                    tables.append([target["app"] for route in table for target in route["targets"]])
        return tables

    def names(self) -> list[list[str]]:
        """Applications of every body, in order."""
        return [sorted(app["name"] for app in body["applications"]) for body in self.bodies]


class FakeRay:
    """A cluster that is started once."""

    def __init__(self, serve: FakeServe) -> None:
        self._serve = serve
        self._running = False

    def dashboard(self) -> FakeServe | None:
        return self._serve if self._running else None

    def start(self, say: Callable[[str], None]) -> FakeServe:
        self._running = True
        return self._serve

    def stop(self, say: Callable[[str], None]) -> bool:
        self._running = False
        return True


@pytest.fixture
def serve() -> FakeServe:
    return FakeServe()


@pytest.fixture
def apply(serve):
    ray = FakeRay(serve)
    return lambda wanted: [action.kind for action in apply_plan(wanted, ray, LineReport(StringIO()), timeout_s=5)]


def test_the_first_time_the_gateway_learns_its_routes_when_the_models_run(serve, apply):
    assert apply(plan()) == ["start_cluster", "deploy_apps", "await_apps", "switch_routes"]
    assert serve.names() == [["gateway", "smollm2-v1"]] * 2
    assert serve.routes() == [[], ["smollm2-v1"]]
    assert serve.bodies[0]["proxy_location"] == "Disabled"


def test_the_second_time_nothing_is_sent(serve, apply):
    apply(plan())
    num_bodies = len(serve.bodies)
    assert apply(plan()) == []
    assert len(serve.bodies) == num_bodies


def test_an_update_never_routes_to_what_does_not_run_and_never_removes_what_is_routed_to(serve, apply):
    apply(plan("v1"))
    first = len(serve.bodies)
    apply(plan("v2"))
    assert serve.names()[first:] == [
        ["gateway", "smollm2-v1", "smollm2-v2"],
        ["gateway", "smollm2-v1", "smollm2-v2"],
        ["gateway", "smollm2-v2"],
    ]
    assert serve.routes()[first:] == [["smollm2-v1"], ["smollm2-v2"], ["smollm2-v2"]]


def test_two_updates_that_take_turns_keep_every_model_routed_to_what_runs(serve, apply):
    apply(twins("v1", "2400MiB"))
    first = len(serve.bodies)
    apply(twins("v2", "2400MiB"))
    old, new = ["smollm2-v1", "other-v1"], ["smollm2-v2", "other-v2"]
    between = ["smollm2-v2", "other-v1"]
    assert serve.routes()[first:] == [old, between, between, between, new, new]
    assert [[name for name in names if name != "gateway"] for names in serve.names()[first:]] == [
        sorted([*old, "smollm2-v2"]),
        sorted([*old, "smollm2-v2"]),
        sorted(between),
        sorted([*between, "other-v2"]),
        sorted([*between, "other-v2"]),
        sorted(new),
    ]


def test_a_second_turn_that_fails_leaves_the_first_done(serve, apply):
    apply(twins("v1", "2400MiB"))
    serve.broken["other-v2"] = "RuntimeError: no"
    with pytest.raises(ControlError, match="other-v2 failed to start"):
        apply(twins("v2", "2400MiB"))
    assert serve.names()[-1] == ["gateway", "other-v1", "smollm2-v2"]
    assert serve.routes()[-1] == ["smollm2-v2", "other-v1"]
    serve.broken.clear()
    assert apply(twins("v2", "2400MiB")) == ["deploy_apps", "await_apps", "switch_routes", "remove_apps"]


def test_new_bounds_are_told_without_touching_arguments_or_routes(serve, apply):
    apply(plan())
    before = serve.bodies[-1]["applications"]
    assert apply(plan(models=SMOLLM2.replace("max: 2", "max: 5"))) == ["change_settings", "await_apps"]
    after = serve.bodies[-1]["applications"]
    assert after[0]["deployments"][0]["autoscaling_config"]["max_replicas"] == 5
    assert [app["args"] for app in after] == [app["args"] for app in before]
    assert after[1] == before[1]


def test_without_room_the_old_version_goes_first_and_its_route_with_it(serve, apply):
    def tight(version: str) -> Plan:
        return plan(version, memory="1GiB")

    apply(tight("v1"))
    first = len(serve.bodies)
    apply(tight("v2"))
    assert serve.names()[first:] == [["gateway"], ["gateway", "smollm2-v2"], ["gateway", "smollm2-v2"]]
    assert serve.routes()[first:] == [[], [], ["smollm2-v2"]]


def test_without_room_an_update_in_place_gets_its_route_back(serve, apply):
    apply(plan(memory="1GiB"))
    first = len(serve.bodies)
    assert apply(plan(memory="1GiB", digest="other")) == ["remove_apps", "deploy_apps", "await_apps", "switch_routes"]
    assert serve.routes()[first:] == [[], [], ["smollm2-v1"]]


def test_a_version_that_does_not_start_is_taken_back_and_the_old_one_keeps_serving(serve, apply):
    apply(plan("v1"))
    before = serve.bodies[-1]
    serve.broken["smollm2-v2"] = "RuntimeError: no"
    with pytest.raises(ControlError) as caught:
        apply(plan("v2"))
    assert str(caught.value) == "smollm2-v2 failed to start: RuntimeError: no\nsmollm2-v1 keeps serving as before."
    assert serve.bodies[-1]["applications"] == before["applications"]
    serve.broken.clear()
    assert apply(plan("v2")) == ["deploy_apps", "await_apps", "switch_routes", "remove_apps"]


def test_a_first_version_that_does_not_start_is_taken_back(serve, apply):
    serve.broken["smollm2-v1"] = "RuntimeError: no"
    with pytest.raises(ControlError, match=r"smollm2-v1 was taken back\."):
        apply(plan())
    assert serve.names()[-1] == ["gateway"]


def test_applications_of_others_are_in_every_body(serve, apply):
    shop = {"name": "shop", "import_path": "shop:app", "route_prefix": "/shop", "args": {}}
    serve.bodies.append({"proxy_location": "EveryNode", "applications": [shop]})
    apply(plan())
    assert all("shop" in names for names in serve.names())
    assert {body["proxy_location"] for body in serve.bodies} == {"EveryNode"}, "their proxies are not ours to change"
