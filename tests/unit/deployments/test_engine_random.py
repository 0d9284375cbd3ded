"""Random workloads: whatever arrives, leaves, runs out of blocks or dies, every client sees its own tokens."""

import asyncio
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.messages import Generate
from deployments.replica.engine import Engine, EngineConfig
from tests.support.engine_runs import TEXT, check, collect, config, expected_choice, generate, link_for, ticks, until

SHARED_PREFIX = (4, 8, 4, 9, 7, 7, 2, 3, 5, 6, 11, 10)


@dataclass(frozen=True)
class Client:
    request: Generate
    arrives: int
    """Turns of the event loop before it comes."""
    leaves_after: int | None
    """Events after which it goes away."""


@st.composite
def clients(draw):
    number = draw(st.integers(1, 7))
    return [draw(client(f"r{index}")) for index in range(number)]


@st.composite
def client(draw, request_id):
    prefix = SHARED_PREFIX[: draw(st.integers(0, len(SHARED_PREFIX)))]
    own = tuple(draw(st.lists(st.integers(2, 11), min_size=1, max_size=10)))
    max_tokens = draw(st.integers(1, 24 - len(own)))
    request = generate(
        request_id,
        prefix + own,
        max_tokens=max_tokens,
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 3)),
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        ignore_eos=draw(st.booleans()),
        min_tokens=draw(st.integers(0, min(3, max_tokens))),
        stop=tuple(draw(st.lists(st.text("!#$%&", min_size=1, max_size=3), max_size=2))),
        stop_token_ids=tuple(draw(st.lists(st.integers(2, 11), max_size=1))),
        logprobs=draw(st.sampled_from([None, 0, 2])),
        logit_bias=draw(st.sampled_from([{}, {0: 1.0}, {0: 2.0}, {0: 3.0}])),  # repeats itself; see fake_stage
    )
    leaves_after = draw(st.one_of(st.none(), st.none(), st.integers(1, 8)))
    return Client(request, draw(st.integers(0, 40)), leaves_after)


engine_configs = st.builds(
    config,
    context_tokens=st.just(36),
    num_blocks=st.integers(9, 24),
    max_running=st.integers(1, 6),
    max_step_tokens=st.integers(2, 20),
    prefix_caching=st.sampled_from([True, True, False]),
    min_decode_split=st.integers(1, 3),
    min_prefill_chunk=st.integers(1, 8),
    steps_ahead=st.sampled_from([0, 1]),
    speculative_tokens=st.sampled_from([0, 1, 4, 9]),
    on_stage_failure=st.just("hold"),
)


async def play(settings_: EngineConfig, crowd: list[Client], num_stages: int, seed: int, failures: list[int]) -> None:
    """Serve the crowd; at each of ``failures`` (a number of further steps) the pipeline dies and is replaced."""
    engine: Engine

    def check_accounts() -> None:
        engine.pool.check_integrity([sequence.blocks for sequence in engine.scheduler.running])

    def new_link(steps_to_live: int | None):
        last = None if steps_to_live is None else engine.stats().num_steps + steps_to_live
        return link_for(settings_, num_stages, schedule_seed=seed, die_at_step=last, on_send=check_accounts)

    async def visit(visitor: Client):
        await ticks(visitor.arrives)
        return await collect(engine, visitor.request, leave_after=visitor.leaves_after)

    engine = Engine(settings_, TEXT, link_for(settings_, num_stages))
    engine._link = new_link(failures[0] if failures else None)
    await engine.start()
    visits = asyncio.gather(*(visit(visitor) for visitor in crowd))
    for position in range(len(failures)):
        await until(lambda: engine.failed is not None or visits.done())
        if engine.failed is not None:
            assert "killed by the test" in engine.failed, engine.failed
            await engine.recover(new_link(failures[position + 1] if position + 1 < len(failures) else None))
    outcomes = await visits
    assert engine.failed is None or "killed by the test" in engine.failed, engine.failed
    for visitor, outcome in zip(crowd, outcomes, strict=True):
        if visitor.leaves_after is None or outcome.finished is not None:
            check(visitor.request, outcome)
        else:
            assert outcome.refused is None
            for index in range(visitor.request.sampling.n):
                seen = outcome.tokens(index)
                assert seen == expected_choice(visitor.request, index).tokens[: len(seen)]
    engine.pool.check_integrity([])
    load, stats = engine.load(), engine.stats()
    assert (load.num_running, load.num_waiting, load.kv_used_fraction) == (0, 0, 0.0)
    assert stats.num_requests_done + stats.num_requests_cancelled == len(crowd)
    await engine.stop()


@settings(max_examples=100, deadline=None)
@given(engine_configs, clients(), st.integers(1, 3), st.integers(0, 2**16))
def test_any_workload_gives_the_reference(settings_, crowd, num_stages, seed):
    asyncio.run(play(settings_, crowd, num_stages, seed, []))


@settings(max_examples=50, deadline=None)
@given(
    engine_configs,
    clients(),
    st.integers(1, 3),
    st.integers(0, 2**16),
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
)
def test_any_workload_survives_the_loss_of_its_stages(settings_, crowd, num_stages, seed, failures):
    asyncio.run(play(settings_, crowd, num_stages, seed, failures))
