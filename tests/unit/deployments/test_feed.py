"""A replica before an engine that schedules by itself: the same answers as with Manta's own stages."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.messages import StageTiming, StepOutput
from deployments.replica.engine import Engine
from deployments.replica.feed import Feed
from deployments.replica.scheduler import StepMismatch
from deployments.replica.sequence import Sequence
from tests.support.engine_runs import TEXT, VOCAB_SIZE, check, collect, config, generate, running, until
from tests.support.fake_free_engine import FreeEngineLink

PROMPT = tuple(2 + (7 * i) % 10 for i in range(30))
TIMING = StageTiming(0, 0.0, 0.0, 0.0, 0.0)


def engine_for(*, max_running=8, on_stage_failure="refuse", **options):
    link = FreeEngineLink(VOCAB_SIZE, **options)
    limits = config(max_running=max_running, on_stage_failure=on_stage_failure)
    return Engine(limits, TEXT, link, planner=Feed(max_running)), link


def requests_for(num, **sampling):
    return [generate(f"r{i}", PROMPT[i:], max_tokens=5 + i, seed=i, **sampling) for i in range(num)]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    max_running=st.integers(1, 6),
    num=st.integers(1, 10),
    sampling=st.sampled_from(
        [
            {"temperature": 0.0},
            {"temperature": 1.0, "n": 3},
            {"temperature": 1.0, "ignore_eos": False, "min_tokens": 2},
            {"stop": ("3", "45"), "ignore_eos": False},
            {"stop_token_ids": (5,), "logprobs": 0},
        ]
    ),
)
def test_any_workload_gives_the_reference(seed, max_running, num, sampling):
    async def run():
        engine, link = engine_for(seed=seed, max_running=max_running)
        requests = requests_for(num, **sampling)
        async with running(engine):
            outcomes = await asyncio.gather(*(collect(engine, request) for request in requests))
            await until(lambda: not link.running)
        for request, outcome in zip(requests, outcomes, strict=True):
            check(request, outcome)
        assert link.most_running <= max_running

    asyncio.run(run())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), at=st.integers(1, 30))
def test_a_new_engine_goes_on_where_the_lost_one_was(seed, at):
    async def run():
        engine, _ = engine_for(seed=seed, die_at_step=at, max_running=3, on_stage_failure="hold")
        requests = requests_for(6, temperature=1.0)
        async with running(engine):
            work = [asyncio.create_task(collect(engine, request)) for request in requests]
            failing = asyncio.create_task(engine.wait_failed())
            await asyncio.wait((failing, asyncio.gather(*work)), return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                second = FreeEngineLink(VOCAB_SIZE, seed=seed + 1)
                await engine.recover(second)
            failing.cancel()
            for request, outcome in zip(requests, await asyncio.gather(*work), strict=True):
                check(request, outcome)

    asyncio.run(run())


async def test_who_leaves_is_ended_in_the_engine_too():
    engine, link = engine_for()
    async with running(engine):
        await collect(engine, generate("leaves", PROMPT, max_tokens=30), leave_after=3)
        await until(lambda: not link.running)
        assert engine.load().num_running == 0
        request = generate("stays", PROMPT)
        check(request, await collect(engine, request))


async def test_requests_beyond_the_limit_wait_in_the_replica_and_are_counted():
    engine, link = engine_for(max_running=2)
    requests = requests_for(5)
    async with running(engine):
        work = [asyncio.create_task(collect(engine, request)) for request in requests]
        await until(lambda: bool(link.running))
        load = engine.load()
        assert (load.num_running, load.num_waiting, load.kv_used_fraction) == (2, 3, 1.0)
        assert load.num_waiting_tokens == sum(len(PROMPT) - i for i in (2, 3, 4))
        for request, outcome in zip(requests, await asyncio.gather(*work), strict=True):
            check(request, outcome)


def sequence(sequence_id):
    sampling = generate("x").sampling
    return Sequence(sequence_id=sequence_id, tokens=[2, 3], num_prompt_tokens=2, sampling=sampling, seed=1)


def test_two_steps_are_in_flight_while_anything_runs_and_none_without():
    feed = Feed(4)
    assert feed.plan() is None
    feed.add(sequence(2))
    feed.add(sequence(1))
    first = feed.plan()
    assert [start.sequence_id for start in first.started] == [1, 2]
    assert feed.plan().started == ()
    assert feed.plan() is None
    feed.complete(StepOutput(step=1, samples=(), timing=TIMING))
    for each in feed.running:
        feed.end(each)
    assert feed.plan().ended == (1, 2)
    feed.complete(StepOutput(step=2, samples=(), timing=TIMING))
    assert feed.plan() is None


def test_an_answer_to_another_step_is_refused():
    feed = Feed(1)
    feed.add(sequence(1))
    feed.plan()
    with pytest.raises(StepMismatch, match="answered step 7; expected 1"):
        feed.complete(StepOutput(step=7, samples=(), timing=TIMING))
