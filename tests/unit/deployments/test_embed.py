import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.messages import Embed, RequestRefused
from deployments.replica.embed import EmbedConfig, EmbedEngine, choose_batch
from tests.support.engine_runs import ticks
from tests.support.fake_embed import FakeEmbedLink, vector_of
from tests.support.tiny_tokenizer import tiny_text

TEXT = tiny_text()


def config(**changes):
    values = {"context_tokens": 16, "max_batch_tokens": 32, "max_batch_items": 4, "max_waiting": 8}
    return EmbedConfig(**(values | changes))


def embed(*inputs, request_id="r", deadline_s=60.0):
    return Embed(request_id=request_id, inputs=inputs, deadline_s=deadline_s)


async def refusal(engine, request):
    with pytest.raises(RequestRefused) as caught:
        await engine.embed(request)
    assert caught.value.refused.request_id == request.request_id
    return caught.value.refused


@pytest.fixture
async def started():
    engines = []

    async def start(link, **changes):
        engine = EmbedEngine(config(**changes), TEXT, link)
        engines.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in engines:
        await engine.stop()
        assert (engine.load().num_running, engine.load().num_waiting) == (0, 0) or engine.failed is not None


@pytest.mark.parametrize("num_stages", [1, 3])
async def test_vectors_come_back_in_the_order_of_the_inputs(started, num_stages):
    engine = await started(FakeEmbedLink(num_stages=num_stages))
    inputs = [tuple(range(2, 3 + (7 * i) % 13)) for i in range(20)]
    requests = [embed(*inputs[i : i + 5], request_id=f"r{i}") for i in range(0, 20, 5)]
    answers = await asyncio.gather(*(engine.embed(request) for request in requests))
    for request, (embedded, vectors) in zip(requests, answers, strict=True):
        assert np.array_equal(vectors, np.stack([vector_of(item) for item in request.inputs]))
        assert (embedded.request_id, embedded.num_vectors, embedded.dimensions) == (request.request_id, 5, 3)
        assert embedded.num_prompt_tokens == sum(len(item) for item in request.inputs)
    assert engine.stats().num_requests_done == 4


async def test_text_and_token_inputs_mix(started):
    engine = await started(FakeEmbedLink())
    _, vectors = await engine.embed(embed("hello world", (5, 6)))
    assert np.array_equal(
        vectors[0], vector_of(tuple(TEXT.encode_text("hello world", request_id="r", context_tokens=16)))
    )
    assert np.array_equal(vectors[1], vector_of((5, 6)))


async def test_requests_that_come_together_share_batches(started):
    link = FakeEmbedLink()
    engine = await started(link)
    await asyncio.gather(*(engine.embed(embed((5, 6, 7), request_id=f"r{i}")) for i in range(8)))
    assert [len(step.inputs) for step in link.sent] == [4, 4]


@settings(max_examples=150)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 100), st.integers(1, 8))
def test_a_batch_holds_the_oldest_and_keeps_its_limits(lengths, max_tokens, max_items):
    chosen = choose_batch(lengths, max_tokens=max_tokens, max_items=max_items)
    assert 0 in chosen
    assert len(set(chosen)) == len(chosen) <= max_items
    assert len(chosen) == 1 or max(lengths[index] for index in chosen) * len(chosen) <= max_tokens
    inside = sorted(lengths[index] for index in chosen)
    outside = [lengths[index] for index in range(len(lengths)) if index not in chosen]
    assert not [length for length in outside if inside[0] < length < inside[-1]], "a batch is a run of like lengths"


def test_a_batch_prefers_like_lengths():
    assert sorted(choose_batch([10, 1, 11, 2, 10], max_tokens=100, max_items=3)) == [0, 2, 4]
    assert sorted(choose_batch([1, 30, 30, 2], max_tokens=60, max_items=4)) == [0, 3]


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (embed(), "invalid_request", "at least one"),
        (embed("ok", ""), "invalid_request", "input 1 has no tokens"),
        (embed("\ud800"), "invalid_request", "U+D800"),
        (embed((9999,)), "invalid_request", "9999"),
        (embed("ok", "z" * 17), "context_length_exceeded", "16 tokens, but input 1 has 17"),
        (embed("z" * 9000), "context_length_exceeded", "of 9000 characters"),
    ],
)
async def test_what_can_never_be_done_is_refused(started, request_, code, words):
    link = FakeEmbedLink()
    engine = await started(link)
    refused = await refusal(engine, request_)
    assert (refused.code, refused.param) == (code, "input")
    assert words in refused.message
    assert not link.sent


async def test_a_full_queue_refuses_and_a_deadline_ends(started):
    link = FakeEmbedLink()
    engine = await started(link, max_waiting=2)
    link.close_gate()
    first = asyncio.create_task(engine.embed(embed((5,), request_id="a")))
    second = asyncio.create_task(engine.embed(embed((6,), request_id="b")))
    await ticks(3)
    refused = await refusal(engine, embed((7,), request_id="c"))
    assert (refused.code, refused.retry_after_s) == ("overloaded", 1.0)
    second.cancel()
    await ticks(3)
    assert (await refusal(engine, embed((7,), request_id="d", deadline_s=0.0))).code == "deadline_exceeded"
    link.open_gate()
    assert np.array_equal((await first)[1], vector_of((5,))[None])
    assert engine.stats().num_requests_cancelled == 1


async def test_a_cancelled_request_leaves_the_queue(started):
    link = FakeEmbedLink()
    engine = await started(link)
    link.close_gate()
    first = asyncio.create_task(engine.embed(embed((5,), request_id="a")))
    await ticks(3)
    second = asyncio.create_task(engine.embed(embed((6,), (7,), request_id="b")))
    await ticks(3)
    assert engine.load().num_waiting == 2
    second.cancel()
    await ticks(3)
    assert engine.load().num_waiting == 0
    link.open_gate()
    await first
    assert [step.inputs for step in link.sent] == [((5,),)]


@pytest.mark.parametrize("how", ["fail_at_step", "die_at_step"])
async def test_lost_stages_end_every_request_now(started, how):
    engine = await started(FakeEmbedLink(**{how: 2}))
    tasks = [engine.embed(embed(*[(5, 6)] * 4, request_id=f"r{i}")) for i in range(4)]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers[0], tuple)
    assert [error.refused.code for error in answers[1:]] == ["draining"] * 3
    assert "stages are lost" in engine.failed
    assert (await refusal(engine, embed((5,), request_id="late"))).code == "draining"


async def test_draining_finishes_what_runs(started):
    link = FakeEmbedLink()
    engine = await started(link)
    link.close_gate()
    running = asyncio.create_task(engine.embed(embed((5,), request_id="a")))
    await ticks(3)
    draining = asyncio.create_task(engine.drain(60.0))
    await ticks(3)
    assert engine.load().draining
    assert (await refusal(engine, embed((6,), request_id="b"))).code == "draining"
    link.open_gate()
    await draining
    assert (await running)[0].num_vectors == 1


async def test_stopping_ends_what_is_under_way(started):
    link = FakeEmbedLink()
    engine = await started(link)
    link.close_gate()
    running = asyncio.create_task(refusal(engine, embed((5,))))
    await ticks(3)
    await engine.stop()
    assert (await running).code == "draining"


def test_limits_under_which_nothing_runs_are_refused():
    with pytest.raises(ValueError, match="max_batch_items is 0"):
        config(max_batch_items=0)
