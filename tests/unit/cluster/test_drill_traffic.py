"""A drill over real HTTP against gateways that break one promise each: it must say which."""

import asyncio
import io
import json
import time
from collections.abc import Sequence

import pytest

from cluster.control.drill import loads
from cluster.control.drill.asks import Ask, make_asks, short_ask
from cluster.control.drill.client import Client
from cluster.control.drill.drill import Drill
from cluster.control.drill.judge import Golden, Promise, nothing_changed, nothing_failed, one_end_each
from cluster.control.drill.outcome import Outcome
from cluster.control.drill.phase import NotPossible, Options, Phase, Scenario
from cluster.control.drill.rates import overload_promises
from cluster.control.drill.traffic import Traffic
from cluster.control.report import LineReport
from cluster.errors import ControlError, PlanError, UsageError
from tests.support.drill_servers import (
    FaultyBackend,
    OneReplicaSite,
    Victim,
    answering,
    event_stream,
    faulty_gateway,
)

PATIENCE_S = 10.0
ASKS = [ask for ask in make_asks("writer", 200, 12, seed=1) if ask.kind != "json"]


async def sent(client: Client, count: int, *, asks: Sequence[Ask] = ASKS, patience_s: float = PATIENCE_S) -> Traffic:
    """The first ``count`` requests of a pool, four at a time."""
    traffic = Traffic(client, asks, patience_s)
    await asyncio.gather(*(traffic.send_each(count // 4) for _ in range(4)))
    return traffic


async def golden(client: Client) -> Golden:
    traffic = await sent(client, 2 * len(ASKS))
    assert nothing_failed(traffic.outcomes).kept
    assert one_end_each(traffic.outcomes).kept, one_end_each(traffic.outcomes).detail
    return {outcome.number: outcome for outcome in traffic.outcomes}


def broken(outcomes: Sequence[Outcome], undisturbed: Golden) -> dict[str, str]:
    promises = [nothing_failed(outcomes), one_end_each(outcomes), nothing_changed(outcomes, undisturbed)]
    return {promise.text: promise.detail for promise in promises if not promise.kept}


async def test_a_healthy_gateway_keeps_every_promise() -> None:
    async with faulty_gateway() as (_, client, _):
        undisturbed = await golden(client)
        traffic = await sent(client, 40)
        assert broken(traffic.outcomes, undisturbed) == {}
        assert {outcome.ask.kind for outcome in traffic.outcomes} == {
            "chat",
            "seeded",
            "choices",
            "logprobs",
            "whole",
        }


FAULTS = {
    "repeat": ({"every request has exactly one end", "answers equal the undisturbed ones"}, "repeats"),
    "drop": ({"every request has exactly one end", "answers equal the undisturbed ones"}, "lost"),
    "fail": ({"every request is answered"}, "could not finish this request"),
    "hang": ({"every request is answered", "every request has exactly one end"}, "no end after 0.2 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_faulty_gateway_is_found_out(fault: str) -> None:
    texts, word = FAULTS[fault]
    async with faulty_gateway() as (backend, client, _):
        undisturbed = await golden(client)
        backend.fault = fault
        traffic = await sent(client, 8, patience_s=0.2 if fault == "hang" else PATIENCE_S)
    found = broken(traffic.outcomes, undisturbed)
    assert found.keys() == texts
    assert word in " ".join(found.values())
    assert len(traffic.outcomes) == 8


async def test_a_connection_that_is_cut_is_broken_however_it_is_cut() -> None:
    piece = json.dumps({"choices": [{"index": 0, "text": "a", "finish_reason": None}]})
    for response in (event_stream(piece), event_stream(piece, length=10_000), b""):
        async with answering(response) as client:
            traffic = await sent(client, 4, asks=[short_ask("writer", 0, 4)])
        assert {outcome.end for outcome in traffic.outcomes} == {"broken"}
        assert not one_end_each(traffic.outcomes).kept


async def test_slow_refusals_are_found_out() -> None:
    async with faulty_gateway() as (backend, client, _):
        backend.fault = "refuse_slowly"
        traffic = await sent(client, 8, asks=[short_ask("writer", 0, 4)])
    found = {promise.text: promise.kept for promise in overload_promises(traffic.outcomes)}
    assert found == {
        "every request is answered or refused with 429": True,
        "refusals take under 100 ms (p99)": False,
        "refusals carry Retry-After": True,
    }


async def test_a_rate_does_not_wait_for_answers() -> None:
    async with faulty_gateway() as (backend, client, _):
        backend.pause_after = 1
        traffic = Traffic(client, [short_ask("writer", 0, 4)], PATIENCE_S)
        await traffic.send_at_rate(50, 0.4)
        num_sent, num_open = len(traffic.outcomes), len(traffic.in_flight)
        backend.resume.set()
        await traffic.stop()
    assert (num_sent, num_open) == (20, 20)
    assert all(outcome.end == "done" for outcome in traffic.outcomes)


async def test_a_client_that_leaves_frees_what_it_held() -> None:
    async with faulty_gateway() as (backend, client, _):
        backend.pause_after = 1
        await client.drop(short_ask("writer", 0, 4), after_s=0.1)
        await backend.wait_for(lambda: backend.num_open == 0)
        assert len(backend.cancelled) == 1
        assert (await client.health())["num_requests"] == 0


@pytest.fixture
def config(tmp_path):
    from cluster.config.load import load_config

    path = tmp_path / "c.yaml"
    path.write_text(
        f"name: test\nstorage: {tmp_path}\ncluster:\n  nodes:\n    - {{name: box, resources: {{CPU: 2}}}}\n"
        "models:\n  - {name: writer, source: 'path:///nowhere'}\n"
    )
    return load_config(path)


class Drilled:
    """A drill on one fake replica, and what it said."""

    def __init__(self, backend: FaultyBackend, client: Client, config: object) -> None:
        self.backend = backend
        self.site = OneReplicaSite(config)
        options = Options(lanes=4, min_requests=12, patience_s=30.0)
        self.drill = Drill(self.site, client, LineReport(io.StringIO()), options)  # type: ignore[arg-type]

    async def run(self, play) -> dict[str, Promise]:
        """Broken promises by text."""
        async with asyncio.timeout(30):
            await self.drill.run([Scenario(name="it", summary="something happens", play=play)])
        (result,) = self.drill.results
        return {promise.text: promise for promise in result.promises if not promise.kept}


@pytest.fixture
async def drilled(config, monkeypatch):
    monkeypatch.setattr("cluster.control.drill.drill._REPORTED_S", 0.0)  # the fake backend's account is never late
    monkeypatch.setattr("cluster.control.drill.drill._MOMENT_S", 0.0)
    async with faulty_gateway() as (backend, client, _):
        yield Drilled(backend, client, config)


async def pause(drill: Drill, phase: Phase) -> None:
    """All streams stand still for a moment, and go on."""
    backend: FaultyBackend = drill.site.backend  # type: ignore[attr-defined]
    backend.pause_after = 3
    phase.traffic.start_lanes(4)
    asyncio.get_running_loop().call_later(0.4, resume, backend)
    await drill.strike(phase, "pause", [Victim(77)], lambda _: None)  # type: ignore[list-item]
    await drill.enough(phase)


def resume(backend: FaultyBackend) -> None:
    backend.pause_after = None
    backend.resume.set()


async def test_a_pause_is_measured_and_keeps_the_promises(drilled: Drilled) -> None:
    drilled.site.backend = drilled.backend  # type: ignore[attr-defined]
    assert await drilled.run(pause) == {}
    (result,) = drilled.drill.results
    assert result.num_requests >= 12
    assert (result.num_failed, result.num_changed) == (0, 0)
    assert result.pause is not None
    assert 0.1 < result.pause.max_s <= result.pause.recover_s + 0.1


async def test_streams_that_do_not_go_on_break_the_promise(drilled: Drilled) -> None:
    async def play(drill: Drill, phase: Phase) -> None:
        drilled.backend.pause_after = 3
        phase.traffic = drill.new_traffic(patience_s=0.2)
        phase.traffic.start_lanes(4)
        await drill.strike(phase, "kill", [Victim(77)], lambda _: None)  # type: ignore[list-item]

    found = await drilled.run(play)
    assert found.keys() == {"every request is answered", "every request has exactly one end"}
    assert "no end after 0.2 s" in found["every request has exactly one end"].detail


async def test_what_is_left_over_breaks_the_promise(drilled: Drilled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.control.drill.drill._CLEAN_TIMEOUT_S", 1.0)

    async def play(drill: Drill, phase: Phase) -> None:
        drilled.site.left_over = ["actor manta:writer-v1:gone:stage-0"]
        phase.traffic.start_lanes(2)
        await drill.enough(phase)

    found = await drilled.run(play)
    assert [promise.detail for promise in found.values()] == ["actor manta:writer-v1:gone:stage-0"]


async def test_what_is_held_for_ever_breaks_the_promise(drilled: Drilled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.control.drill.drill._CLEAN_TIMEOUT_S", 0.2)

    async def play(drill: Drill, phase: Phase) -> None:
        await phase.traffic.send_each(12)
        drilled.backend.num_open += 1  # a request that the replica never lets go

    found = await drilled.run(play)
    assert list(found) == ["nothing is held when no request is open"]
    assert "1 running" in found["nothing is held when no request is open"].detail


@pytest.mark.parametrize("error", [NotPossible("there is no store"), PlanError("no room for 2")])
async def test_a_scenario_that_cannot_be_played_is_skipped_with_the_reason(
    drilled: Drilled, error: Exception
) -> None:
    async def play(drill: Drill, phase: Phase) -> None:
        raise error

    assert await drilled.run(play) == {}
    assert drilled.drill.results[0].skipped == str(error)


async def test_a_change_that_fails_breaks_the_promise_and_the_cluster_is_put_back(drilled: Drilled) -> None:
    async def play(drill: Drill, phase: Phase) -> None:
        phase.traffic.start_lanes(2)
        await drill.change(phase, "update", lambda model: model)

    drilled.site.error = ControlError("the new replica does not start")
    found = await drilled.run(play)
    assert found["the scenario goes to its end"].detail == "the new replica does not start"
    assert drilled.site.calls == ["change", "restore"]


async def test_an_interrupted_drill_waits_for_the_change_and_puts_the_cluster_back(drilled: Drilled) -> None:
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow_change(change: object, report: object) -> None:
        loop.call_soon_threadsafe(begun.set)
        time.sleep(0.3)
        drilled.site.calls.append("changed")

    async def play(drill: Drill, phase: Phase) -> None:
        phase.traffic.start_lanes(2)
        await drill.change(phase, "update", lambda model: model)

    drilled.site.change = slow_change  # type: ignore[method-assign]
    running = asyncio.create_task(drilled.run(play))
    await asyncio.wait_for(begun.wait(), 10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert drilled.site.calls == ["changed", "restore"]
    assert drilled.drill.results == []


async def test_bfloat16_is_not_compared_and_the_drill_says_so(drilled: Drilled) -> None:
    drilled.site.arguments_found |= {"dtype": "bfloat16", "kernels": "auto"}

    async def play(drill: Drill, phase: Phase) -> None:
        drilled.backend.fault = None
        phase.traffic.start_lanes(2)
        await drill.enough(phase)

    assert await drilled.run(play) == {}
    assert drilled.drill.results[0].num_changed is None
    assert "not compared" in drilled.drill.notes[0]


async def test_kinds_that_a_model_refuses_are_not_asked_and_the_drill_says_so(drilled: Drilled) -> None:
    drilled.backend.fault = "no_chat"
    assert await drilled.run(loads.undisturbed) == {}
    assert {ask.kind for ask in drilled.drill.asks} == {"seeded", "choices", "logprobs"}
    assert "not asked: chat (400: no chat template)" in drilled.drill.notes


async def test_a_cluster_that_fails_undisturbed_is_not_drilled(drilled: Drilled) -> None:
    drilled.backend.fault = "fail"
    with pytest.raises(ControlError, match=r"fails while nothing happens.*could not finish this request"):
        await drilled.run(pause)
    assert drilled.site.calls == ["restore"]


async def test_more_streams_than_places_are_wrong_usage(drilled: Drilled) -> None:
    drilled.site.arguments_found |= {"max_running": 2, "max_waiting": 1}
    with pytest.raises(UsageError, match="4 streams, but there are places for 3"):
        await drilled.run(pause)


async def test_an_undisturbed_run_tells_how_steady_streams_are(drilled: Drilled) -> None:
    assert await drilled.run(loads.undisturbed) == {}
    assert "longest silence" in drilled.drill.results[0].notes[0]


async def test_an_overload_is_measured_against_its_peak(drilled: Drilled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.control.drill.loads._RAMP_S", 0.1)
    drilled.drill.options = Options(load_s=0.5)
    drilled.backend.replace_settings(max_streams=10)
    await drilled.run(loads.overload)
    (result,) = drilled.drill.results
    promises = {promise.text: promise for promise in result.promises}
    assert promises["every request is answered or refused with 429"].kept
    assert "of" in promises["goodput is at least 90% of its peak"].detail


async def test_clients_that_leave_are_survived(drilled: Drilled) -> None:
    drilled.drill.options = Options(num_cycles=40)
    assert await drilled.run(loads.disconnect) == {}
    (result,) = drilled.drill.results
    assert "40 connections dropped" in result.notes[0]
    assert "all was free" in result.notes[1]


async def test_a_soak_tells_the_slope_of_memory(drilled: Drilled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.control.drill.loads._SAMPLE_S", 0.1)
    drilled.drill.options = Options(soak_s=0.2, min_requests=4)
    assert await drilled.run(loads.soak) == {}
    (result,) = drilled.drill.results
    (flat,) = (promise for promise in result.promises if promise.text == "memory is flat")
    assert "gateway" in flat.detail
    assert "too short a time to tell" in flat.detail
