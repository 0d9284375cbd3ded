import asyncio

import pytest

from deployments.messages import Delta, RequestRefused, Started, TextPrompt
from deployments.replica.engine import Engine, EngineConfig
from tests.support.engine_runs import (
    TEXT,
    FakeClock,
    check,
    collect,
    config,
    expected_choice,
    generate,
    link_for,
    running,
    ticks,
    until,
)

PROMPT = tuple(2 + (7 * i) % 10 for i in range(30))


def engine_for(settings=None, *, num_stages=2, clock=None, **options):
    settings = settings or config()
    link = link_for(settings, num_stages, **options)
    engine = Engine(settings, TEXT, link, **({"clock": clock} if clock else {}))
    return engine, link


@pytest.mark.parametrize("num_stages", [1, 2, 3])
async def test_running_ahead_changes_nothing_but_when_steps_are_sent(num_stages):
    requests = [
        generate(f"r{i}", PROMPT[i : i + 9], max_tokens=40, temperature=1.0, seed=i, n=1 + i % 2, stop=("&(",),
                 ignore_eos=bool(i % 3))
        for i in range(6)
    ]  # fmt: skip
    seen = []
    for steps_ahead in (0, 1):
        engine, link = engine_for(config(num_blocks=17, steps_ahead=steps_ahead), num_stages=num_stages)
        async with running(engine):
            outcomes = await asyncio.gather(*(collect(engine, request) for request in requests))
            assert engine.stats().num_preemptions > 0, "the pool was to be too small"
        assert (link.num_ahead > 0) == bool(steps_ahead)
        for request, outcome in zip(requests, outcomes, strict=True):
            check(request, outcome)
        seen.append([[outcome.tokens(i) for i in range(2)] for outcome in outcomes])
    assert seen[0] == seen[1]


async def test_a_sequence_that_ends_wastes_at_most_one_position_and_a_known_end_none():
    stops = {"stop_token_ids": tuple(range(2, 12))}
    for steps_ahead, sampling, num_wasted in ((1, {}, 0), (1, stops, 1), (0, stops, 0)):
        engine, link = engine_for(config(steps_ahead=steps_ahead), num_stages=1)
        request = generate(prompt=PROMPT, max_tokens=6, **sampling)
        async with running(engine):
            check(request, await collect(engine, request))
        num_tokens = expected_choice(request).tokens
        num_positions = sum(part.num_tokens for step in link.sent for part in step.sequences)
        assert num_positions == len(PROMPT) + len(num_tokens) - 1 + num_wasted


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("max_step_tokens", [2, 7, 64])
async def test_one_request_is_the_reference_for_any_pipeline_and_chunk_size(num_stages, max_step_tokens):
    engine, _ = engine_for(config(max_step_tokens=max_step_tokens), num_stages=num_stages)
    request = generate(prompt=PROMPT, max_tokens=20)
    async with running(engine):
        check(request, await collect(engine, request))


async def test_company_changes_nothing():
    engine, _ = engine_for()
    requests = [generate(f"r{i}", PROMPT[i:], max_tokens=5 + i, temperature=1.0, seed=i) for i in range(12)]
    async with running(engine):
        outcomes = await asyncio.gather(*(collect(engine, request) for request in requests))
    for request, outcome in zip(requests, outcomes, strict=True):
        check(request, outcome)


async def test_a_repeated_prompt_comes_from_the_prefix_cache():
    engine, link = engine_for()
    first, second = generate("a", PROMPT), generate("b", PROMPT)
    async with running(engine):
        check(first, await collect(engine, first))
        num_steps = len(link.sent)
        outcome = await collect(engine, second)
        check(second, outcome)
        assert outcome.started.num_cached_tokens == outcome.finished.num_cached_tokens == 28
        assert engine.stats().num_prefix_hits == 28
        assert sum(part.num_tokens for step in link.sent[num_steps:] for part in step.sequences) == 2 + 7


async def test_a_fully_cached_prompt_still_computes_its_last_token():
    engine, _ = engine_for()
    prompt = PROMPT[:8]
    async with running(engine):
        await collect(engine, generate("a", prompt))
        outcome = await collect(engine, generate("b", prompt))
        assert outcome.started.num_cached_tokens == 4
        check(generate("b", prompt), outcome)


async def test_without_prefix_caching_nothing_is_shared():
    engine, _ = engine_for(config(prefix_caching=False))
    async with running(engine):
        await collect(engine, generate("a", PROMPT))
        outcome = await collect(engine, generate("b", PROMPT, n=3, temperature=1.0))
        check(generate("b", PROMPT, n=3, temperature=1.0), outcome)
        assert outcome.started.num_cached_tokens == 0


async def test_choices_differ_and_share_the_prompt():
    engine, link = engine_for()
    request = generate(prompt=PROMPT, n=3, temperature=1.0, max_tokens=6)
    async with running(engine):
        outcome = await collect(engine, request)
    check(request, outcome)
    assert len({tuple(outcome.tokens(index)) for index in range(3)}) == 3
    num_prompt = sum(len(p.token_ids) for step in link.sent for p in step.sequences if p.position < len(PROMPT))
    assert num_prompt == 30 + 2 + 2, "the second and third choice compute only what is behind the last full block"


async def test_preemption_recomputes_without_a_trace():
    settings = config(num_blocks=17, max_running=4)
    engine, _ = engine_for(settings)
    requests = [generate(f"r{i}", PROMPT[i : i + 10], max_tokens=40, seed=i, temperature=1.0) for i in range(4)]
    async with running(engine):
        outcomes = await asyncio.gather(*(collect(engine, request) for request in requests))
        assert engine.stats().num_preemptions > 0
    for request, outcome in zip(requests, outcomes, strict=True):
        check(request, outcome)


async def test_closing_the_stream_frees_the_blocks_at_once():
    engine, link = engine_for()
    async with running(engine):
        events = engine.submit(generate(prompt=PROMPT, max_tokens=30))
        async for event in events:
            if isinstance(event, Delta):
                break
        assert engine.pool.num_used > 0
        num_sent = len(link.sent)
        await events.aclose()
        assert engine.pool.num_used == 0
        await ticks(50)
        assert len(link.sent) == num_sent, "no step is spent on a client that has gone"
        assert engine.stats().num_requests_cancelled == 1
        check(generate("next"), await collect(engine, generate("next")))
        assert link.sent[-1].step > num_sent


async def test_cancelling_the_reading_task_frees_a_waiting_request():
    engine, link = engine_for(config(max_running=1))
    link.close_gate()
    async with running(engine):
        first = asyncio.create_task(collect(engine, generate("a")))
        second = asyncio.create_task(collect(engine, generate("b")))
        await ticks(5)
        assert engine.load().num_waiting == 1
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert engine.load().num_waiting == 0
        link.open_gate()
        check(generate("a"), await first)


async def test_a_seed_is_drawn_and_reported_when_none_is_given():
    engine, _ = engine_for()
    request = generate(seed=None, temperature=1.0, max_tokens=12)
    async with running(engine):
        first, second = await collect(engine, request), await collect(engine, request)
    assert first.started.seed != second.started.seed
    check(request, first)


@pytest.mark.parametrize(
    "sampling",
    [
        {"ignore_eos": False},
        {"ignore_eos": False, "min_tokens": 25},
        {"ignore_eos": False, "include_stop_str_in_output": True, "skip_special_tokens": False},
        {"stop_token_ids": (5,)},
        {"stop_token_ids": (5,), "min_tokens": 20},
        {"stop": ("%",)},
        {"stop": ("%", "&'"), "include_stop_str_in_output": True},
        {"stop": ("$",), "min_tokens": 20},
        {"stop": ("never",)},
    ],
)
async def test_stopping(sampling):
    engine, _ = engine_for()
    requests = [generate(f"r{seed}", max_tokens=40, temperature=1.0, seed=seed, **sampling) for seed in range(12)]
    async with running(engine):
        outcomes = await asyncio.gather(*(collect(engine, request) for request in requests))
    for request, outcome in zip(requests, outcomes, strict=True):
        check(request, outcome)
    reasons = {outcome.ends()[0][0] for outcome in outcomes}
    assert ("stop" in reasons) == (sampling.get("stop") != ("never",))


async def test_logprobs_have_one_entry_per_token():
    engine, _ = engine_for()
    async with running(engine):
        outcome = await collect(engine, generate(logprobs=2, max_tokens=5))
        plain = await collect(engine, generate(max_tokens=5))
    entries = [entry for delta in outcome.deltas for entry in delta.logprobs]
    assert [entry.chosen.token_id for entry in entries] == outcome.tokens()
    assert all(len(entry.top) == 2 for entry in entries)
    assert all(delta.logprobs == () for delta in plain.deltas)


async def test_no_limit_fills_the_context():
    engine, _ = engine_for()
    async with running(engine):
        outcome = await collect(engine, generate(prompt=PROMPT, max_tokens=None))
    assert outcome.finished.num_completion_tokens == 64 - 30
    assert outcome.ends() == [("length", None)]


@pytest.mark.parametrize(
    ("request_", "code", "param", "words"),
    [
        (generate(prompt=PROMPT, max_tokens=35), "context_length_exceeded", "prompt", ("64", "65", "30", "34")),
        (generate(prompt=PROMPT * 3), "context_length_exceeded", "prompt", ("64", "90", "63")),
        (generate(prompt=PROMPT * 3, max_tokens=None), "context_length_exceeded", "prompt", ("64", "90")),
        (generate(min_tokens=9), "invalid_request", "min_tokens", ("9", "8")),
        (generate(n=0), "invalid_request", "n", ("0",)),
        (generate(logit_bias={9999: 1.0}), "invalid_request", "logit_bias", ("9999",)),
        (generate(stop_token_ids=(-1,)), "invalid_request", "stop_token_ids", ("-1",)),
        (generate(prompt=()), "invalid_request", "prompt", ("no tokens",)),
        (generate(prompt=(9999,)), "invalid_request", "prompt", ("9999",)),
    ],
)
async def test_what_can_never_be_done_is_refused_up_front(request_, code, param, words):
    engine, link = engine_for()
    async with running(engine):
        refused = (await collect(engine, request_)).refused
        assert engine.stats().num_requests_refused == 1
    assert (refused.code, refused.param, refused.request_id) == (code, param, "r")
    assert all(word in refused.message for word in words)
    assert not link.sent


async def test_a_negative_limit_is_refused():
    engine, _ = engine_for()
    async with running(engine):
        refused = (await collect(engine, generate(max_tokens=-3))).refused
    assert (refused.code, refused.param) == ("invalid_request", "max_tokens")


async def test_a_request_id_in_use_is_refused():
    engine, link = engine_for()
    link.close_gate()
    async with running(engine):
        first = asyncio.create_task(collect(engine, generate()))
        await ticks(5)
        assert "already in use" in (await collect(engine, generate())).refused.message
        link.open_gate()
        check(generate(), await first)


async def test_a_long_text_is_tokenized_off_the_loop_and_then_judged():
    engine, _ = engine_for()
    request = generate(max_tokens=None)
    request = type(request)(
        request_id="long",
        prompt=TextPrompt(text="z" * 5000),
        sampling=request.sampling,
        max_tokens=None,
        deadline_s=60.0,
    )
    async with running(engine):
        refused = (await collect(engine, request)).refused
    assert refused.code == "context_length_exceeded"
    assert "context is 64 tokens, but the first 512 of 5000 characters alone have 512" in refused.message


async def test_a_full_queue_refuses_with_a_time_to_come_back():
    clock = FakeClock()
    engine, link = engine_for(config(max_running=2, max_waiting=3), clock=clock)
    async with running(engine):
        warm = asyncio.create_task(collect(engine, generate("warm")))
        await ticks(3)
        clock.now += 10.0
        await warm
        link.close_gate()
        tasks = [asyncio.create_task(collect(engine, generate(f"r{i}"))) for i in range(5)]
        await ticks(5)
        assert (engine.load().num_running, engine.load().num_waiting) == (2, 3)
        refused = (await collect(engine, generate("more"))).refused
        assert refused.code == "overloaded"
        assert refused.retry_after_s == pytest.approx(10.0 * 3 / 2)
        link.open_gate()
        for index, outcome in enumerate(await asyncio.gather(*tasks)):
            check(generate(f"r{index}"), outcome)


async def test_a_deadline_ends_running_and_waiting_requests():
    clock = FakeClock()
    engine, link = engine_for(config(max_running=1), clock=clock)
    async with running(engine):
        link.close_gate()
        tasks = [asyncio.create_task(collect(engine, generate(f"r{i}", deadline_s=5.0 + i))) for i in range(3)]
        await ticks(5)
        clock.now += 6.0
        engine.check_deadlines()
        refusals = [(await task).refused for task in tasks[:2]]
        assert [(refused.code, refused.request_id) for refused in refusals] == [
            ("deadline_exceeded", "r0"),
            ("deadline_exceeded", "r1"),
        ]
        assert "6 s" in refusals[1].message
        link.open_gate()
        check(generate("r2"), await tasks[2])


async def test_draining_finishes_what_runs_and_refuses_what_comes():
    engine, link = engine_for()
    link.close_gate()
    async with running(engine):
        task = asyncio.create_task(collect(engine, generate()))
        await ticks(5)
        draining = asyncio.create_task(engine.drain(60.0))
        await ticks(2)
        assert engine.load().draining
        assert (await collect(engine, generate("late"))).refused.code == "draining"
        link.open_gate()
        await draining
        check(generate(), await task)


async def test_draining_ends_what_does_not_finish_in_time():
    engine, link = engine_for()
    link.close_gate()
    async with running(engine):
        task = asyncio.create_task(collect(engine, generate()))
        await ticks(5)
        await engine.drain(0.0)
        assert (await task).refused.code == "draining"


async def test_stopping_ends_every_request():
    engine, link = engine_for()
    link.close_gate()
    await engine.start()
    task = asyncio.create_task(collect(engine, generate()))
    await ticks(5)
    await engine.stop()
    assert (await task).refused.code == "draining"
    assert engine.pool.num_used == 0


@pytest.mark.parametrize("how", ["fail_at_step", "die_at_step"])
async def test_a_lost_stage_ends_every_request_now(how):
    engine, _ = engine_for(**{how: 6})
    await engine.start()
    outcomes = await asyncio.gather(*(collect(engine, generate(f"r{i}", max_tokens=30)) for i in range(3)))
    assert [outcome.refused.code for outcome in outcomes] == ["internal"] * 3
    assert "stages are lost" in engine.failed
    assert (await collect(engine, generate("late"))).refused.code == "internal"
    assert engine.pool.num_used == 0
    await engine.stop()


@pytest.mark.parametrize("how", ["fail_at_step", "die_at_step"])
@pytest.mark.parametrize("at", range(1, 30))
async def test_recovery_repeats_and_loses_nothing(how, at):
    settings = config(on_stage_failure="hold", num_blocks=20)
    engine, _ = engine_for(settings, **{how: at})
    requests = [
        generate(f"r{i}", PROMPT[i : i + 12], max_tokens=20, temperature=1.0, seed=i, n=1 + i % 2, stop=("&(",))
        for i in range(4)
    ]
    await engine.start()
    tasks = [asyncio.create_task(collect(engine, request)) for request in requests]
    await until(lambda: engine.failed is not None)
    assert engine.load().num_running + engine.load().num_waiting > 0
    await engine.recover(link_for(settings, 3))
    for request, outcome in zip(requests, await asyncio.gather(*tasks), strict=True):
        check(request, outcome)
    assert engine.failed is None
    assert engine.stats().num_recoveries == 1
    engine.pool.check_integrity([])
    await engine.stop()


@pytest.mark.parametrize("at", range(1, 12))
async def test_recovery_from_a_stage_that_takes_no_more_steps(at):
    settings = config()
    engine, link = engine_for(settings, hang_at_step=at)
    requests = [generate(f"r{i}", PROMPT[i : i + 6], max_tokens=12, temperature=1.0, seed=i) for i in range(3)]
    await engine.start()
    tasks = [asyncio.create_task(collect(engine, request)) for request in requests]
    await until(lambda: len(link.sent) == at)
    await ticks(20)
    await engine.recover(link_for(settings))
    for request, outcome in zip(requests, await asyncio.gather(*tasks), strict=True):
        check(request, outcome)
    await engine.stop()


async def test_requests_wait_out_a_recovery_but_not_beyond_their_deadline():
    clock = FakeClock()
    settings = config(on_stage_failure="hold")
    engine, _ = engine_for(settings, fail_at_step=1, clock=clock)
    await engine.start()
    early = asyncio.create_task(collect(engine, generate("early", deadline_s=5.0)))
    await until(lambda: engine.failed is not None)
    late = asyncio.create_task(collect(engine, generate("late", deadline_s=60.0)))
    await ticks(5)
    clock.now += 10.0
    engine.check_deadlines()
    assert (await early).refused.code == "deadline_exceeded"
    await engine.recover(link_for(settings))
    check(generate("late"), await late)
    await engine.stop()


async def test_an_answer_that_was_not_asked_for_marks_the_engine_failed():
    engine, link = engine_for()

    async def receive():
        answer = await original()
        return type(answer)(step=answer.step + 1, samples=answer.samples, timing=answer.timing)

    original, link.receive = link.receive, receive
    await engine.start()
    outcome = await collect(engine, generate())
    assert outcome.refused.code == "internal"
    assert "step 2" in engine.failed
    await engine.stop()


async def test_the_pipeline_is_kept_full_and_balanced():
    engine, link = engine_for(config(max_running=8, max_step_tokens=64))
    async with running(engine):
        tasks = [asyncio.create_task(collect(engine, generate(f"r{i}", max_tokens=30))) for i in range(8)]
        await until(lambda: len(link.sent) >= 12)
        sizes = [len(step.sequences) for step in link.sent[8:12]]
        assert sizes == [4, 4, 4, 4]
        await asyncio.gather(*tasks)


async def test_observations_reach_telemetry():
    seen = []

    class Recorder:
        def step_done(self, timing):
            seen.append(("step", timing.stage))

        def first_token(self, seconds):
            seen.append(("first", seconds))

        def request_done(self, seconds_per_token, num_completion_tokens):
            seen.append(("done", seconds_per_token, num_completion_tokens))

    settings = config()
    engine = Engine(settings, TEXT, link_for(settings), telemetry=Recorder(), clock=FakeClock())
    async with running(engine):
        await collect(engine, generate(max_tokens=3))
    assert seen == [("step", 1), ("first", 0.0), ("step", 1), ("step", 1), ("done", 0.0, 3)]


async def test_started_comes_before_the_first_delta_and_refusals_raise():
    engine, _ = engine_for()
    async with running(engine):
        events = [event async for event in engine.submit(generate(max_tokens=1))]
        assert isinstance(events[0], Started)
        assert expected_choice(generate(max_tokens=1)).tokens == list(events[1].token_ids)
        with pytest.raises(RequestRefused, match="context_length_exceeded"):
            await anext(engine.submit(generate(max_tokens=1000)))


def test_a_cache_smaller_than_one_context_is_refused():
    with pytest.raises(ValueError, match="40 tokens, less than one context of 64"):
        config(num_blocks=10)
    with pytest.raises(ValueError, match="max_waiting"):
        config(max_waiting=-1)
    assert isinstance(config(), EngineConfig)
