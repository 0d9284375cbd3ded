"""The router over real channels: requests find the least loaded replica, or wait for one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest

from cluster.plan.types import RouteTarget
from deployments.channel import Channel, ChannelClosed, Listener
from deployments.messages import (
    Classify,
    Delta,
    Detokenize,
    Embed,
    Finished,
    Generate,
    Load,
    RequestRefused,
    SamplingParams,
    Started,
    TextPrompt,
    Tokenize,
)
from deployments.router.choose import choose_replica, choose_target
from deployments.router.connection import ReplicaConnection, ReplicaEndpoint, ReplicaLostError
from deployments.router.pool import REFRESH_S, ReplicaPool, next_pause_s
from deployments.router.router import Router
from tests.support.fake_cluster import FakeCluster, table
from tests.support.speaking_service import SpeakingService


@contextlib.asynccontextmanager
async def routed(*services: SpeakingService) -> AsyncIterator[tuple[Router, FakeCluster]]:
    cluster = FakeCluster()
    for service in services:
        await cluster.add("m-v1", service.name, service)
    router = Router(table(m=[("m-v1", 1.0)]), cluster.open_pool)
    try:
        yield router, cluster
    finally:
        await router.close()
        await cluster.stop()


def request(number: int, deadline_s: float = 5.0) -> Generate:
    return Generate(
        request_id=f"r{number}",
        prompt=TextPrompt(text="hi"),
        sampling=SamplingParams(max_tokens=5),
        max_tokens=5,
        deadline_s=deadline_s,
    )


async def text_of(router: Router, number: int) -> str:
    events = [event async for event in router.generate("m", request(number))]
    assert [type(events[0]), type(events[-1])] == [Started, Finished]
    return "".join(event.text for event in events if isinstance(event, Delta))


async def test_requests_spread_over_replicas_by_what_is_open_on_them() -> None:
    held = [SpeakingService(name, hold_after=1) for name in ("aaa", "bbb")]
    async with routed(*held) as (router, _):
        await router._pools["m-v1"].refresh()
        tasks = [asyncio.create_task(text_of(router, number)) for number in range(6)]
        while sum(len(service.seen) for service in held) < 6:
            await asyncio.sleep(0.01)
        assert [len(service.seen) for service in held] == [3, 3]
        for service in held:
            service.released.set()
        assert sorted(await asyncio.gather(*tasks)) == ["aaa"] * 3 + ["bbb"] * 3


async def test_leaving_a_stream_cancels_it_at_the_replica() -> None:
    service = SpeakingService("abc", hold_after=1)
    async with routed(service) as (router, _):
        events = router.generate("m", request(1))
        assert isinstance(await anext(events), Started)
        assert isinstance(await anext(events), Delta)
        await events.aclose()
        await asyncio.wait_for(service.cancelled.wait(), 5)


async def test_a_replica_lost_before_the_first_token_is_replaced_by_another() -> None:
    dying, other = SpeakingService("aaa", hold_after=0), SpeakingService("bbb")
    async with routed(dying, other) as (router, cluster):
        task = asyncio.create_task(text_of(router, 1))
        while not dying.seen:
            await asyncio.sleep(0.01)
        cluster.cut("m-v1", "aaa")
        assert await asyncio.wait_for(task, 5) == "bbb"


async def test_a_draining_replica_hands_new_requests_to_another() -> None:
    async with routed(SpeakingService("aaa", draining=True), SpeakingService("bbb")) as (router, _):
        assert await text_of(router, 1) == "bbb"


async def test_a_request_waits_for_the_first_replica_until_its_deadline() -> None:
    async with routed() as (router, cluster):
        waiting = asyncio.create_task(text_of(router, 1))
        with pytest.raises(RequestRefused, match="no replica answered within"):
            await anext(router.generate("m", request(2, deadline_s=0.05)))
        await cluster.add("m-v1", "late", SpeakingService("late"))
        assert await asyncio.wait_for(waiting, 5) == "late"


async def test_those_who_wait_for_a_replica_search_together_and_survive_failures_of_the_search() -> None:
    cluster = FakeCluster()
    num_calls = 0

    async def wake() -> ReplicaEndpoint:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise TimeoutError("the control plane is away")
        await cluster.add("m-v1", "late", SpeakingService("late"))
        return cluster.endpoints["m-v1"]["late"]

    async def discover() -> list[ReplicaEndpoint]:
        raise ConnectionError("the control plane is away")

    router = Router(table(m=[("m-v1", 1.0)]), lambda app: ReplicaPool(app, discover, wake))
    texts = await asyncio.wait_for(asyncio.gather(*(text_of(router, number) for number in range(20))), 5)
    assert texts == ["late"] * 20
    assert num_calls == 2
    await router.close()
    await cluster.stop()


async def test_a_pool_closes_also_when_its_search_takes_no_cancellation() -> None:
    searching = asyncio.Event()

    async def discover() -> list[ReplicaEndpoint]:
        searching.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ConnectionError("the answer that came at the same moment") from None
        return []

    async def wake() -> ReplicaEndpoint:
        raise ConnectionError("the control plane is away")

    pool = ReplicaPool("m-v1", discover, wake)
    await searching.wait()
    await asyncio.wait_for(pool.close(), 5)


async def test_a_replica_that_cannot_be_reached_is_not_asked_for_in_a_tight_loop() -> None:
    num_calls = 0

    async def wake() -> ReplicaEndpoint:
        nonlocal num_calls
        num_calls += 1
        return ReplicaEndpoint(replica_id="gone", address="127.0.0.1:1", secret=b"s" * 32)

    async def discover() -> list[ReplicaEndpoint]:
        return []

    router = Router(table(m=[("m-v1", 1.0)]), lambda app: ReplicaPool(app, discover, wake))
    with pytest.raises(RequestRefused, match="no replica answered within"):
        await anext(router.generate("m", request(1, deadline_s=0.3)))
    assert 1 <= num_calls <= 4
    await router.close()


async def test_a_replica_that_falls_silent_is_lost() -> None:
    async def say_nothing(channel: Channel) -> None:
        with contextlib.suppress(ChannelClosed):
            while True:
                await channel.receive()

    listener = Listener(say_nothing)
    endpoint = ReplicaEndpoint(replica_id="mute", address=await listener.start("127.0.0.1"), secret=listener.secret)
    connection = await ReplicaConnection.open(endpoint, silence_s=0.1)
    with pytest.raises(ReplicaLostError, match="was silent"):
        await asyncio.wait_for(anext(connection.replies(request(1))), 5)
    assert connection.is_lost
    assert "secret" not in repr(endpoint)
    await connection.close()
    await listener.stop()


async def test_a_new_table_moves_new_requests_and_leaves_old_ones_where_they_are() -> None:
    old, new = SpeakingService("old", hold_after=1), SpeakingService("new")
    async with routed(old) as (router, cluster):
        await cluster.add("m-v2", "new", new)
        events = router.generate("m", request(1))
        await anext(events)
        router.replace(table(m=[("m-v2", 1.0)]))
        assert await text_of(router, 2) == "new"
        old.released.set()
        assert "".join([e.text async for e in events if isinstance(e, Delta)]) == "old"
        router.replace(table())
        with pytest.raises(RequestRefused, match="no longer served"):
            await text_of(router, 3)


async def test_questions_are_answered_and_a_mistake_of_the_replica_is_an_internal_error() -> None:
    async with routed(SpeakingService("aaa")) as (router, _):
        header, vectors = await router.embed("m", Embed(request_id="e", inputs=("a", "b"), deadline_s=5))
        assert header.num_prompt_tokens == 4
        assert vectors.tolist() == [[0, 1, 2], [3, 4, 5]]
        classified, probabilities = await router.classify("m", Classify(request_id="c", inputs=("a",), deadline_s=5))
        assert (classified.labels, classified.num_prompt_tokens) == (("no", "yes"), 3)
        assert probabilities.tolist() == [[0.25, 0.75]]
        assert (await router.detokenize("m", Detokenize(request_id="d", token_ids=(104, 105)))).text == "hi"
        with pytest.raises(RequestRefused, match="a mistake of ours"):
            await router.tokenize("m", Tokenize(request_id="t", prompt=TextPrompt(text="x")))
        assert await text_of(router, 9) == "aaa"


def test_traffic_is_split_by_weight() -> None:
    targets = [RouteTarget(app="a", version="v1", weight=3), RouteTarget(app="b", version="v2", weight=1)]
    chosen = [choose_target(targets, point / 100).app for point in range(100)]
    assert chosen.count("a") == 75
    assert choose_target([RouteTarget(app="a", version="v1", weight=0), targets[1]], 0.0).app == "b"


def test_the_least_loaded_replica_is_chosen_and_never_a_draining_one() -> None:
    def load(waiting_tokens: int = 0, running: int = 0, draining: bool = False) -> Load:
        return Load(
            num_running=running,
            num_waiting=0,
            num_waiting_tokens=waiting_tokens,
            kv_used_fraction=0.0,
            draining=draining,
        )

    assert choose_replica({"a": load(10), "b": load(5)}, {}) == "b"
    assert choose_replica({"a": load(), "b": load()}, {"a": 2, "b": 1}) == "b"
    assert choose_replica({"a": load(running=4), "b": load(running=1)}, {"a": 0, "b": 1}) == "b"
    assert choose_replica({"a": load(5), "b": load(0)}, {"a": 0, "b": 3}) == "a", "what was sent since counts"
    assert choose_replica({"a": load(draining=True), "b": load(99, 99)}, {}) == "b"
    assert choose_replica({"a": load(draining=True)}, {}) is None


async def test_health_is_ok_while_any_model_can_be_asked_also_one_that_a_request_would_wake() -> None:
    async with routed(SpeakingService("aaa")) as (router, _):
        await router._pools["m-v1"].refresh()
        both = table(m=[("m-v1", 1.0)], gone=[("gone-v1", 1.0)])
        router.replace(both)
        health = router.health()
        assert health.status == "ok", "one model that lacks its replicas takes no other one out of service"
        assert [model.num_replicas for model in health.models] == [1, 0]
        router.replace(table(gone=[("gone-v1", 1.0)]))
        assert router.health().status == "starting"
        (asleep,) = router.table.routes
        router.replace(router.table.model_copy(update={"routes": (asleep.model_copy(update={"min_replicas": 0}),)}))
        assert router.health().status == "ok"


def test_replicas_are_looked_for_less_often_while_nothing_changes_and_nobody_waits() -> None:
    def pauses(load: Load) -> list[float]:
        found = [REFRESH_S]
        for _ in range(4):
            found.append(next_pause_s(found[-1], changed=False, loads=[load]))
        return found

    quiet = Load(num_running=5, num_waiting=0, num_waiting_tokens=0, kv_used_fraction=0.5, draining=False)
    assert pauses(quiet) == [1.0, 2.0, 4.0, 4.0, 4.0]
    assert pauses(msgspec.structs.replace(quiet, num_waiting=1)) == [1.0] * 5, "a replica may be added"
    assert pauses(msgspec.structs.replace(quiet, draining=True)) == [1.0] * 5, "another one takes its place"
    assert next_pause_s(4.0, changed=True, loads=[quiet]) == 1.0
    assert next_pause_s(4.0, changed=False, loads=[]) == 1.0
