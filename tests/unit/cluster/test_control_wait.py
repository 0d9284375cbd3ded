"""Serve's recorded answers in; views, errors and waiting out."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from cluster.control import wait
from cluster.control.report import LineReport, TerminalReport, describe
from cluster.control.wait import AppView, await_apps, await_gone, error_text, longest_drain_s, view
from cluster.errors import ControlError
from tests.unit.cluster.recorded_dashboard import RecordedDashboard, recorded


def views(name: str) -> dict[str, AppView]:
    return {app: view(app, details) for app, details in recorded(name)["applications"].items()}


def test_a_replica_that_failed_once_shows_its_own_error_while_serve_tries_again():
    found = views("serve_failing.json")["toy-v2"]
    assert found.status == "DEPLOYING"
    assert not found.failed
    assert found.error == "RuntimeError: stage 1: cannot allocate 99GiB (deliberate)"


def test_given_up_applications_show_the_last_exception_without_frames():
    found = views("serve_failed.json")
    assert found["toy-v2"].failed
    assert found["toy-v2"].error == "RuntimeError: stage 1: cannot allocate 99GiB (deliberate)"
    assert found["toy-v3"].error == "AttributeError: module 'toy_app' has no attribute 'build_nothing'"


def test_a_replica_without_room_says_what_it_waits_for():
    found = views("serve_pending.json")["toy-v4"]
    assert found.error is None
    assert found.waiting_for is not None
    assert found.waiting_for.endswith("1 replicas that have taken more than 30s to be scheduled")


def test_an_application_that_serve_does_not_list_yet_is_not_running():
    assert not view("x", None).running


def test_exceptions_of_several_lines_are_kept_whole():
    frames = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    g()\n'
    message = frames + "ValueError: 2 errors\n  a: b\n  c: d"
    assert error_text(message) == "ValueError: 2 errors\n  a: b\n  c: d"


@pytest.mark.parametrize("message", ["", "Deploying.", "has 1 replicas that have taken more than 30s"])
def test_messages_without_a_traceback_hold_no_error(message):
    assert error_text(message) is None


def test_waiting_ends_when_everything_runs():
    shown: list[tuple[AppView, ...]] = []
    with RecordedDashboard({"/api/serve/applications/": ["serve_running.json"]}) as dashboard:
        failed = await_apps(dashboard, ["smollm2-v1", "gateway"], lambda seen: shown.append(tuple(seen)), timeout_s=5)
    assert failed == {}
    assert [found.status for found in shown[-1]] == ["RUNNING", "RUNNING"]


def test_waiting_ends_with_the_error_of_the_application_that_failed(monkeypatch):
    monkeypatch.setattr(wait, "_POLL_S", 0.0)
    answers = {"/api/serve/applications/": ["serve_failing.json", "serve_failed.json"]}
    with RecordedDashboard(answers) as dashboard:
        failed = await_apps(dashboard, ["toy-v1", "toy-v2"], lambda _: None, timeout_s=30)
    assert failed == {"toy-v2": "toy-v2 failed to start: RuntimeError: stage 1: cannot allocate 99GiB (deliberate)"}


def test_a_death_without_a_traceback_shows_the_end_of_the_replicas_log():
    details = recorded("serve_failed.json")
    details["applications"]["toy-v2"]["deployments"]["Replica"]["message"] = "The replica died."
    answers = {"/api/serve/applications/": [details], "/api/v0/logs/file": ["out of memory\n"]}
    with RecordedDashboard(answers) as dashboard:
        failed = await_apps(dashboard, ["toy-v2"], lambda _: None, timeout_s=5)
    assert failed["toy-v2"].endswith("the end of its replica's log:\nout of memory")


class Busy:
    """A dashboard that leaves the first requests without an answer."""

    def __init__(self, num_unanswered: int) -> None:
        self.num_unanswered = num_unanswered

    def serve_details(self) -> dict[str, object]:
        self.num_unanswered -= 1
        if self.num_unanswered >= 0:
            raise ControlError("did not answer within 30 s")
        return recorded("serve_running.json")


def test_a_dashboard_that_is_busy_for_a_while_does_not_end_the_wait(monkeypatch):
    monkeypatch.setattr(wait, "_POLL_S", 0.0)
    assert await_apps(Busy(4), ["smollm2-v1"], lambda _: None, timeout_s=60) == {}
    await_gone(Busy(4), ["other-v1"], timeout_s=60)
    with pytest.raises(ControlError, match="did not answer"):
        await_apps(Busy(5), ["smollm2-v1"], lambda _: None, timeout_s=60)
    with pytest.raises(ControlError, match="did not answer"):
        await_apps(Busy(1), ["smollm2-v1"], lambda _: None, timeout_s=-1)


def test_what_stops_is_given_the_longest_drain_of_all():
    draining = [{"deployments": [{"graceful_shutdown_timeout_s": seconds}]} for seconds in (60.0, 900.0)]
    apps = [*draining, {"deployments": [{"name": "Gateway"}]}, {"args": {"cpus": 0.1}}]
    assert longest_drain_s(apps) == 900.0
    assert longest_drain_s([]) == 0.0


def test_waiting_has_a_deadline_that_says_what_is_late():
    with RecordedDashboard({"/api/serve/applications/": ["serve_pending.json"]}) as dashboard:
        with pytest.raises(ControlError, match="not running after 0 s: toy-v4 is DEPLOYING"):
            await_apps(dashboard, ["toy-v4"], lambda _: None, timeout_s=0)
        with pytest.raises(ControlError, match="toy-v4 did not stop within 0 s"):
            await_gone(dashboard, ["toy-v4"], timeout_s=0)


def test_a_line_is_written_when_a_state_changes_and_not_otherwise(tmp_path: Path):
    with (tmp_path / "out").open("w+") as stream:
        report = LineReport(stream)
        failing = views("serve_failing.json")["toy-v2"]
        report.apps([failing])
        report.apps([failing])
        report.apps([views("serve_failed.json")["toy-v2"]])
        stream.seek(0)
        lines = stream.read().splitlines()
    assert lines[0] == f"toy-v2: {describe(failing)}"
    assert len(lines) == 2


def test_a_long_step_is_a_line_per_tenth(tmp_path: Path):
    with (tmp_path / "out").open("w+") as stream:
        report = LineReport(stream)
        for done in range(101):
            report.progress("download x", done * 2**20, 100 * 2**20, "B")
        stream.seek(0)
        lines = stream.read().splitlines()
    assert len(lines) == 11
    assert lines[-1] == "download x: 100.0MiB of 100.0MiB"


def test_a_terminal_gets_bars_a_table_and_sentences_one_below_the_other():
    stream = StringIO()
    report = TerminalReport(Console(file=stream, force_terminal=True, width=100))
    report.progress("download [x]", 2**20, 4 * 2**20, "B")
    report.progress("convert", 1, None, "tensors")
    report.apps([views("serve_failing.json")["toy-v2"]])
    report.say("Route smollm2 to [v2].")
    report.close()
    shown = stream.getvalue()
    parts = ["download [x]", "1.0/4.0 MiB", "convert", "cannot allocate 99GiB (deliberate)", "Route smollm2 to [v2]."]
    assert [part for part in parts if part not in shown] == []
    assert shown.index("99GiB") < shown.index("Route smollm2")


def test_the_recordings_are_json():
    for path in (Path(__file__).parent / "recorded").iterdir():
        json.loads(path.read_text())
