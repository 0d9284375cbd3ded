"""The supervisor: stages are lost and repaired, streams go on; what cannot be mended is given up, with its reason."""

import asyncio

import numpy as np
import pytest

from deployments.messages import Embed, RequestRefused
from deployments.replica.embed import EmbedConfig, EmbedEngine
from deployments.replica.engine import Engine
from deployments.replica.supervise import Supervisor
from deployments.stage.link import Repair, StageLostError
from tests.support.engine_runs import TEXT, check, collect, config, generate, link_for, until
from tests.support.fake_embed import FakeEmbedLink, vector_of

HOLD = config(on_stage_failure="hold")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before another attempt at a repair, and for the link's account of a loss, which a fake one has at once."""
    monkeypatch.setattr("deployments.replica.supervise._RETRY_S", 0.01)
    monkeypatch.setattr("deployments.replica.supervise._BLAME_S", 0.005)


class Link:
    """A fake pipeline whose connections can break while nothing is under way."""

    def __init__(self, pipeline: FakeEmbedLink | None = None, **options) -> None:
        self.pipeline = pipeline or link_for(HOLD, **options)
        self.closed = False
        self.suspects: set[int] = set()
        self.lost: asyncio.Future[StageLostError] = asyncio.get_running_loop().create_future()

    @property
    def num_stages(self) -> int:
        return self.pipeline.num_stages

    async def send(self, step) -> None:
        await self.pipeline.send(step)

    async def receive(self):
        return await self.pipeline.receive()

    async def receive_vectors(self):
        return await self.pipeline.receive_vectors()

    async def wait_lost(self) -> StageLostError:
        return await asyncio.shield(self.lost)

    def quiet_s(self, stage: int | None) -> float | None:
        return 0.5 if stage is not None else None

    async def close(self) -> None:
        self.closed = True


class Stages:
    """Hands out the links it was given; an exception among them is raised."""

    def __init__(self, *links: Link | Exception) -> None:
        self.links = list(links)
        self.suspects: list[frozenset[int]] = []

    async def repair(self, suspects) -> Repair:
        self.suspects.append(frozenset(suspects))
        link = self.links.pop(0)
        if isinstance(link, Exception):
            raise link
        return Repair(link=link, replaced=(1,), spawn_s=2.0, load_s=1.0, connect_s=0.1)


async def supervised(first: Link, *repaired: Link | Exception):
    engine = Engine(HOLD, TEXT, first)
    await engine.start()
    supervisor = Supervisor(engine, Stages(*repaired), first)
    return engine, supervisor, asyncio.create_task(supervisor.run())


async def stop(engine: Engine, task: asyncio.Task) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await engine.stop()


@pytest.mark.parametrize("how", ["fail_at_step", "die_at_step"])
async def test_streams_go_on_after_a_repair_that_took_two_attempts(how: str) -> None:
    first = Link(**{how: 7})
    engine, supervisor, task = await supervised(first, RuntimeError("no room yet"), Link())
    requests = [generate(f"r{i}", max_tokens=20, seed=i, temperature=1.0) for i in range(4)]
    for request, outcome in zip(
        requests, await asyncio.gather(*(collect(engine, request) for request in requests)), strict=True
    ):
        check(request, outcome)
    assert first.closed
    assert supervisor.given_up is None
    await stop(engine, task)


async def test_a_loss_is_seen_while_nothing_is_under_way() -> None:
    first, second = Link(), Link()
    engine, _, task = await supervised(first, second)
    first.lost.set_result(StageLostError(1, "its process is gone"))
    await until(lambda: engine.stats().num_recoveries == 1)
    request = generate(max_tokens=8)
    check(request, await collect(engine, request))
    assert second.pipeline.sent
    await stop(engine, task)


async def test_a_request_that_fails_step_after_step_is_ended_and_the_others_go_on() -> None:
    engine, _, task = await supervised(Link(fail_at_step=3), Link(fail_at_step=5), Link())
    bad = await collect(engine, generate("bad", max_tokens=20))
    assert bad.refused.code == "internal"
    assert "2 steps with this request failed" in bad.refused.message
    good = generate("good", max_tokens=20)
    check(good, await collect(engine, good))
    await stop(engine, task)


async def test_stages_that_are_lost_again_and_again_are_given_up() -> None:
    engine, supervisor, task = await supervised(Link(die_at_step=1), *(Link(die_at_step=1) for _ in range(9)))
    asking = asyncio.create_task(collect(engine, generate(max_tokens=60)))
    await task
    assert "lost 6 times without a token in between" in supervisor.given_up
    assert not asking.done(), "whoever hangs up decides"
    await engine.stop()
    assert (await asking).refused.code == "draining", "another replica may take it"


async def test_losses_with_tokens_in_between_are_borne_until_they_are_a_crowd() -> None:
    links = [Link(die_at_step=12 * (number + 1)) for number in range(30)]
    engine, supervisor, task = await supervised(*links)
    outcomes = []

    async def ask_on() -> None:
        while not outcomes or outcomes[-1].refused is None:
            outcomes.append(await collect(engine, generate(max_tokens=20)))

    asking = asyncio.create_task(ask_on())
    await task
    assert "lost 21 times within" in supervisor.given_up
    await engine.stop()
    await asking
    for outcome in outcomes[:-1]:
        check(generate(max_tokens=20), outcome)


async def test_what_it_took_is_told_part_by_part_and_suspects_are_named() -> None:
    told = []

    class Telemetry:
        def recovered(self, num_replaced, parts_s) -> None:
            told.append((num_replaced, dict(parts_s)))

    first, second = Link(), Link()
    engine = Engine(HOLD, TEXT, first)
    await engine.start()
    stages = Stages(second)
    task = asyncio.create_task(Supervisor(engine, stages, first, Telemetry()).run())
    first.suspects.add(1)
    first.lost.set_result(StageLostError(1, "its frame was damaged"))
    await until(lambda: bool(told))
    ((num_replaced, parts),) = told
    assert num_replaced == 1
    assert list(parts) == ["detect", "spawn", "load", "connect"]
    assert [parts[part] for part in ("detect", "spawn", "load")] == [0.5, 2.0, 1.0]
    assert stages.suspects == [frozenset({1})]
    await stop(engine, task)


async def test_embeddings_under_way_are_computed_again_by_new_stages() -> None:
    settings_ = EmbedConfig(
        context_tokens=32, max_batch_tokens=64, max_batch_items=4, max_waiting=16, on_stage_failure="hold"
    )
    failing = FakeEmbedLink(num_stages=2, fail_at_step=4)
    links = [Link(FakeEmbedLink(num_stages=2, die_at_step=2)), Link(failing), Link(FakeEmbedLink(num_stages=2))]
    engine = EmbedEngine(settings_, TEXT, links[0])
    await engine.start()
    task = asyncio.create_task(Supervisor(engine, Stages(*links[1:]), links[0]).run())
    inputs = [((5 + number, 6), (7,), (8, 9, number + 2)) for number in range(8)]
    requests = [Embed(request_id=f"r{i}", inputs=items, deadline_s=60.0) for i, items in enumerate(inputs)]
    answers = await asyncio.gather(*(engine.embed(request) for request in requests))
    for items, (_, vectors) in zip(inputs, answers, strict=True):
        assert np.array_equal(vectors, np.stack([vector_of(item) for item in items]))
    assert engine.stats().num_recoveries == 2
    await stop(engine, task)


async def test_an_input_that_no_stage_survives_ends_its_own_request_alone() -> None:
    class Poisoned(FakeEmbedLink):
        async def send(self, step) -> None:
            self._fail_at_step = step.step if (6, 6, 6) in step.inputs else self._fail_at_step
            await super().send(step)

    settings_ = EmbedConfig(
        context_tokens=32, max_batch_tokens=64, max_batch_items=8, max_waiting=16, on_stage_failure="hold"
    )
    links = [Link(Poisoned()) for _ in range(6)]
    engine = EmbedEngine(settings_, TEXT, links[0])
    await engine.start()
    task = asyncio.create_task(Supervisor(engine, Stages(*links[1:]), links[0]).run())
    asking = [
        asyncio.create_task(engine.embed(Embed(request_id=f"r{i}", inputs=(item,), deadline_s=60.0)))
        for i, item in enumerate([(5,), (6, 6, 6), (7,), (8,)])
    ]
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert [isinstance(result, RequestRefused) for result in results] == [False, True, False, False]
    assert "made a stage fail twice" in str(results[1])
    await stop(engine, task)


async def test_a_mistake_of_the_engine_itself_is_not_taken_for_a_loss() -> None:
    link = Link()
    engine, supervisor, task = await supervised(link)
    engine._fail("blocks are held by nobody; this is a bug", recoverable=False)
    await task
    assert "this is a bug" in supervisor.given_up
