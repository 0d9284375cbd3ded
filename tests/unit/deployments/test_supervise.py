"""The supervisor: stages are lost and repaired, streams go on; what cannot be mended is given up, with its reason."""

import asyncio

import pytest

from deployments.replica.engine import Engine
from deployments.replica.supervise import Supervisor
from deployments.stage.link import StageLostError
from tests.support.engine_runs import TEXT, check, collect, config, generate, link_for, until

HOLD = config(on_stage_failure="hold")


class Link:
    """A fake pipeline whose connections can break while nothing is under way."""

    def __init__(self, **options) -> None:
        self.pipeline = link_for(HOLD, **options)
        self.closed = False
        self.lost: asyncio.Future[StageLostError] = asyncio.get_running_loop().create_future()

    @property
    def num_stages(self) -> int:
        return self.pipeline.num_stages

    async def send(self, step) -> None:
        await self.pipeline.send(step)

    async def receive(self):
        return await self.pipeline.receive()

    async def wait_lost(self) -> StageLostError:
        return await asyncio.shield(self.lost)

    async def close(self) -> None:
        self.closed = True


class Stages:
    """Hands out the links it was given; an exception among them is raised."""

    def __init__(self, *links: Link | Exception) -> None:
        self.links = list(links)

    async def repair(self):
        link = self.links.pop(0)
        if isinstance(link, Exception):
            raise link
        return link, [1]


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
    engine, supervisor, task = await supervised(Link(die_at_step=3), *(Link(die_at_step=9 + i) for i in range(9)))
    outcome = await collect(engine, generate(max_tokens=60))
    assert outcome.refused.code == "draining", "another replica may take it"
    await task
    assert "lost 6 times" in supervisor.given_up


async def test_a_mistake_of_the_engine_itself_is_not_taken_for_a_loss() -> None:
    link = Link()
    engine, supervisor, task = await supervised(link)
    engine._fail("blocks are held by nobody; this is a bug", recoverable=False)
    await task
    assert "this is a bug" in supervisor.given_up
