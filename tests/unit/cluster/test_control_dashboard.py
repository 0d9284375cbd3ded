"""The REST client against a server that replays Ray's recorded answers."""

import pytest

from cluster.config.nodes import ExistingProvider
from cluster.control import wait
from cluster.control.dashboard import Dashboard
from cluster.control.existing import ExistingRay
from cluster.control.logs import log_files, read_logs
from cluster.control.observe import Processes, cluster_status, observe, status_from
from cluster.control.ports import unused_ports
from cluster.errors import ControlError
from tests.unit.cluster.recorded_dashboard import RecordedDashboard, recorded

SERVE = "/api/serve/applications/"


def test_observed_is_what_serve_says():
    with RecordedDashboard({SERVE: ["serve_running.json"]}) as dashboard:
        observed = observe(dashboard)
    assert observed.proxies == {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 28000},
    }
    assert {name: (app.status, app.num_running_replicas) for name, app in observed.own.items()} == {
        "smollm2-v1": ("RUNNING", 1),
        "gateway": ("RUNNING", 1),
    }


def test_nothing_runs_without_a_dashboard():
    assert not observe(None).ray_running
    assert cluster_status("c", None).ray == "stopped"


def test_a_cluster_without_serve_has_no_address_and_no_applications():
    empty = {"controller_info": {}, "proxies": {}, "applications": {}, "target_capacity": None}
    with RecordedDashboard({SERVE: [empty]}) as dashboard:
        observed = observe(dashboard)
        status = cluster_status("c", dashboard)
    assert (observed.ray_running, observed.proxies, dict(observed.apps)) == (True, None, {})
    assert (status.ray, status.url, status.models) == ("running", None, ())


def test_status_lists_models_versions_replicas_and_living_stages():
    answers = {SERVE: ["serve_running.json"], "/api/v0/actors": ["actors.json"], "/api/v0/nodes": ["nodes.json"]}
    with RecordedDashboard(answers) as dashboard:
        status = cluster_status("rc", dashboard)
    (model,) = status.models
    (version,) = model.versions
    (replica,) = version.replicas
    assert (model.name, version.version, version.status, replica.id) == ("smollm2", "v1", "RUNNING", "551u3fkz")
    assert [(stage.index, stage.layers, stage.node, stage.pid, stage.state) for stage in replica.stages] == [
        (0, (0, 12), "127.0.0.1", 28468, "ALIVE"),
        (1, (12, 25), "127.0.0.1", 28466, "ALIVE"),
        (2, (25, 30), "127.0.0.1", 28495, "ALIVE"),
    ]
    assert status.gateway is not None
    assert status.url == "http://127.0.0.1:28001"


def test_memory_of_other_nodes_is_what_their_agents_report_and_missing_stages_are_said_to_be():
    actors = recorded("actors.json")["data"]["result"]["result"]
    first = next(actor for actor in actors if actor["name"] == "manta:smollm2-v1:551u3fkz:stage-0")
    nodes = {first["node_id"]: "10.0.0.7"}
    processes = Processes([first], nodes, {first["actor_id"]: 123})
    status = status_from("rc", "http://d", recorded("serve_running.json"), processes)
    stages = status.models[0].versions[0].replicas[0].stages
    assert [(stage.state, stage.node, stage.resident_bytes) for stage in stages] == [
        ("ALIVE", "10.0.0.7", 123),
        ("MISSING", None, None),
        ("MISSING", None, None),
    ]


def test_logs_are_those_of_living_replicas_and_stages():
    answers = {
        SERVE: ["serve_running.json"],
        "/api/v0/actors": ["actors.json"],
        "/api/v0/logs/file": [":job_id:01\nfirst line\nsecond line"],
    }
    with RecordedDashboard(answers) as dashboard:
        files = log_files(dashboard, "smollm2")
        lines = [(line.label, line.text) for line in read_logs(dashboard, files, 10)]
        with pytest.raises(ControlError, match=r"nope is not deployed at .*; deployed: gateway, smollm2"):
            log_files(dashboard, "nope")
    stages = [f"smollm2-v1/551u3fkz/stage-{index}" for index in range(3)]
    assert [file.label for file in files] == ["smollm2-v1/551u3fkz", *stages]
    assert lines[:2] == [("smollm2-v1/551u3fkz", "first line"), ("smollm2-v1/551u3fkz", "second line")]


def test_down_on_an_existing_cluster_leaves_the_applications_of_others(monkeypatch):
    monkeypatch.setattr(wait, "_POLL_S", 0.0)
    mixed = recorded("serve_running.json")
    other = recorded("serve_foreign.json")["applications"]["toy-v1"]
    mixed["applications"]["toy-v1"] = other
    left = recorded("serve_running.json")
    left["applications"] = {"toy-v1": other}
    replay = RecordedDashboard({SERVE: [mixed, mixed, "", left], "/api/version": [{"version": "4"}]})
    with replay:
        ray = ExistingRay(ExistingProvider(kind="existing", dashboard=replay.url), "test")
        assert ray.stop(lambda _: None)
        ray.dashboard().close()
    (body,) = [body for method, _, body in replay.requests if method == "PUT"]
    assert [app["name"] for app in body["applications"]] == ["toy-v1"]
    assert body["proxy_location"] == "HeadOnly"
    assert body["http_options"] == {"host": "127.0.0.1", "port": 28000}
    assert "DELETE" not in {method for method, _, _ in replay.requests}


def test_down_leaves_a_cluster_of_another_name_alone():
    theirs = recorded("serve_running.json")
    theirs["applications"]["gateway"]["deployed_app_config"]["args"]["cluster"] = "theirs"
    replay = RecordedDashboard({SERVE: [theirs], "/api/version": [{"version": "4"}]})
    with replay:
        ray = ExistingRay(ExistingProvider(kind="existing", dashboard=replay.url), "ours")
        with pytest.raises(ControlError, match=r"cluster ours: .*serves cluster theirs.*`manta down` .* of theirs"):
            ray.stop(lambda _: None)
        ray.dashboard().close()
    assert {method for method, _, _ in replay.requests} == {"GET"}


def test_the_token_is_sent_as_bearer_and_a_missing_one_is_named(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret")
    assert Dashboard.with_token_from_environment("http://x")._session.headers["Authorization"] == "Bearer s3cret"
    with (
        RecordedDashboard({}, status=401) as dashboard,
        pytest.raises(ControlError, match="wants a token; set RAY_AUTH_TOKEN"),
    ):
        dashboard.version()


def test_an_answer_that_is_an_error_is_quoted():
    with (
        RecordedDashboard({SERVE: ["no such thing"]}, status=400) as dashboard,
        pytest.raises(ControlError, match="answered 400 to PUT: no such thing"),
    ):
        dashboard.put_applications({})


def test_something_else_on_that_port_is_not_taken_for_a_dashboard():
    expected = "did not answer with JSON; is this the address of a Ray dashboard"
    with RecordedDashboard({SERVE: ["<html>"]}) as dashboard, pytest.raises(ControlError, match=expected):
        dashboard.serve_details()


def test_nobody_there_is_said_with_the_address():
    (port,) = unused_ports(1)
    dashboard = Dashboard(f"http://127.0.0.1:{port}")
    assert not dashboard.is_up()
    with pytest.raises(ControlError, match=f"no Ray dashboard answers at http://127.0.0.1:{port}.*refused"):
        dashboard.version()
