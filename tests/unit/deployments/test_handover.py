"""Streams go from replica to replica: wherever the cut falls, the client sees what an undisturbed one says."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.gateway.backend import Event
from deployments.messages import (
    ChatPrompt,
    Delta,
    Detokenize,
    Embed,
    Embedded,
    EmittedChoice,
    Finished,
    Generate,
    Load,
    Refused,
    RequestRefused,
    Started,
    Tokenize,
)
from deployments.replica.engine import Engine
from deployments.replica.text import TextTokenizer
from deployments.router.progress import Losses, StreamProgress
from deployments.router.router import Router
from tests.support.engine_runs import TEXT, Outcome, check, collect, config, generate, link_for, running, until
from tests.support.fake_cluster import FakeCluster, table
from tests.support.tiny_tokenizer import EOS_ID, byte_level_tokenizer

APP = "m-v1"
CONFIG = config(on_stage_failure="hold")


class EngineReplica:
    """A real engine over the fake pipeline, as a gateway sees it; ``at_step`` is called before that step is sent."""

    def __init__(self, *, at_step: tuple[int, Callable[[], None]] | None = None, **changes) -> None:
        self.seen: list[Generate] = []
        self._at_step = at_step
        settings_ = config(on_stage_failure="hold", **changes)
        self.link = link_for(settings_, on_send=self._count)
        self.engine = Engine(settings_, TEXT, self.link)

    def _count(self) -> None:
        if self._at_step is not None and len(self.link.sent) + 1 == self._at_step[0]:
            self._at_step[1]()

    def generate(self, request: Generate) -> AsyncGenerator[Started | Delta | Finished]:
        self.seen.append(request)
        return self.engine.submit(request)

    async def embed(self, request: Embed):
        raise NotImplementedError

    def tokenize(self, request: Tokenize):
        raise NotImplementedError

    def detokenize(self, request: Detokenize):
        raise NotImplementedError

    def load(self) -> Load:
        return self.engine.load()


class Play:
    """A cluster of engines, a router before it, and the means to break it."""

    def __init__(self) -> None:
        self.cluster = FakeCluster()
        self.replicas: dict[str, EngineReplica] = {}
        self.hand_overs: list[tuple[str, str]] = []
        self.router = Router(
            table(m=[(APP, 1.0)]),
            self.cluster.open_pool,
            lambda model, cause: self.hand_overs.append((model, cause)),
        )
        self.begun = asyncio.Event()
        """Some client has heard that its request was admitted."""
        self.answered = asyncio.Event()
        """Some client has a token."""

    async def add(self, name: str, app: str = APP, produces: str = "", **options) -> EngineReplica:
        replica = self.replicas[name] = EngineReplica(**options)
        await replica.engine.start()
        await self.cluster.add(app, name, replica, produces=produces)
        return replica

    async def ask(self, request: Generate) -> Outcome:
        events = self._heard(self.router.generate("m", request))
        replicas_view = type("View", (), {"submit": staticmethod(lambda _: events)})
        return await collect(replicas_view, request)

    async def _heard(self, events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
        async with contextlib.aclosing(events):
            async for event in events:
                self.begun.set()
                if isinstance(event, Delta) and event.token_ids:
                    self.answered.set()
                yield event

    def drain(self, name: str) -> None:
        """What a replica does when Serve stops it."""
        self.cluster.hide(APP, name)
        self.replicas[name].engine.stop_admitting()
        self.cluster.announce(name)

    async def close(self) -> None:
        await self.router.close()
        await self.cluster.stop()
        for replica in self.replicas.values():
            engine = replica.engine
            await until(lambda engine=engine: engine.load().num_running + engine.load().num_waiting == 0)
            engine.pool.check_integrity([])
            await engine.stop()


@contextlib.asynccontextmanager
async def play() -> AsyncIterator[Play]:
    scene = Play()
    try:
        yield scene
    finally:
        await asyncio.wait_for(scene.close(), 10)


@st.composite
def requests(draw):
    max_tokens = draw(st.integers(1, 20))
    stop_token_ids = tuple(draw(st.lists(st.integers(2, 11), max_size=1)))
    return generate(
        f"r{draw(st.integers(0, 10**6))}",
        draw(st.lists(st.integers(2, 11), min_size=1, max_size=10)),
        max_tokens=max_tokens,
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.sampled_from([None, 0, 3])),
        n=draw(st.sampled_from([1, 1, 2, 3])),
        ignore_eos=draw(st.booleans()),
        min_tokens=draw(st.integers(0, min(3, max_tokens))),
        stop=tuple(draw(st.lists(st.text("!#$%&", min_size=1, max_size=3), max_size=2))),
        stop_token_ids=stop_token_ids,
        include_stop_str_in_output=not stop_token_ids and draw(st.booleans()),
        logprobs=draw(st.sampled_from([None, 0, 2])),
    )


async def survive(crowd: list[Generate], cuts: list[tuple[str, int]]) -> None:
    """Serve ``crowd``; all replicas but the last are cut off, or drain, each before a step of its own."""
    async with play() as scene:

        def end(index: int) -> Callable[[], None]:
            how = cuts[index][0]
            return lambda: scene.cluster.cut(APP, f"a{index}") if how == "cut" else scene.drain(f"a{index}")

        for index, (_, step) in enumerate(cuts):
            await scene.add(f"a{index}", at_step=(step, end(index)))
        await scene.add("z")
        outcomes = await asyncio.wait_for(asyncio.gather(*(scene.ask(request) for request in crowd)), 30)
        for request, outcome in zip(crowd, outcomes, strict=True):
            check(request, outcome)
            check_logprobs(request, outcome)
            assert outcome.finished.num_cached_tokens == outcome.started.num_cached_tokens


def check_logprobs(request: Generate, outcome: Outcome) -> None:
    """One entry per token where asked for, each beside its own token."""
    for delta in outcome.deltas:
        if request.sampling.logprobs is None:
            assert not delta.logprobs
        else:
            assert [entry.chosen.token_id for entry in delta.logprobs] == list(delta.token_ids)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(requests(), min_size=1, max_size=4, unique_by=lambda request: request.request_id),
    st.lists(st.tuples(st.sampled_from(["cut", "drain"]), st.integers(1, 25)), min_size=1, max_size=2),
)
def test_wherever_the_cut_falls_the_client_sees_what_an_undisturbed_replica_says(crowd, cuts):
    asyncio.run(survive(crowd, cuts))


@settings(max_examples=100, deadline=None)
@given(requests(), st.lists(st.integers(0, 20), min_size=3, max_size=3))
def test_any_cut_between_any_tokens_of_any_choice_continues_exactly(request, cuts):
    """Without a network in between: the second engine gets the first deltas of each choice, however many."""

    async def run() -> None:
        async with running(Engine(CONFIG, TEXT, link_for(CONFIG))) as first:
            whole = await collect(first, request)
        check(request, whole)
        by_choice = [[d for d in whole.deltas if d.index == index] for index in range(request.sampling.n)]
        kept = [deltas[:cut] for deltas, cut in zip(by_choice, cuts, strict=False)]
        emitted = tuple(
            EmittedChoice(
                tuple(token_id for delta in deltas for token_id in delta.token_ids),
                bool(deltas) and deltas[-1].finish_reason is not None,
            )
            for deltas in kept
        )
        if all(choice.ended for choice in emitted):
            return
        resumed = generate_again(request, whole.started.seed, emitted)
        async with running(Engine(CONFIG, TEXT, link_for(CONFIG))) as second:
            rest = await collect(second, resumed)
        assert rest.refused is None
        for index, deltas in enumerate(kept):
            assert deltas + [d for d in rest.deltas if d.index == index] == by_choice[index]
        assert rest.finished.num_completion_tokens == whole.finished.num_completion_tokens
        assert rest.finished.num_prompt_tokens == whole.finished.num_prompt_tokens

    asyncio.run(run())


def generate_again(request: Generate, seed: int, emitted: tuple[EmittedChoice, ...]) -> Generate:
    """The request as a router would hand it over."""
    sampling = msgspec.structs.replace(request.sampling, seed=seed)
    return msgspec.structs.replace(request, sampling=sampling, emitted=emitted)


@pytest.mark.parametrize("how", ["cut", "drain"])
async def test_a_request_that_waits_in_the_queue_of_a_replica_that_goes_is_not_turned_away_by_a_full_one(how) -> None:
    async with play() as scene:
        one = {"max_running": 1, "max_waiting": 1}
        old, full = await scene.add("a", **one), await scene.add("b", **one)
        await scene.router._pools[APP].refresh()
        for replica in (old, full):
            replica.link.close_gate()
        requests_ = [generate(f"r{number}", max_tokens=20) for number in range(4)]
        asking = [asyncio.create_task(scene.ask(request)) for request in requests_]
        await until_real(lambda: [len(replica.seen) for replica in (old, full)] == [2, 2])
        if how == "cut":
            scene.cluster.cut(APP, "a")
        else:
            scene.drain("a")
        await until_real(lambda: len(full.seen) == 4)
        for replica in (old, full):
            replica.link.open_gate()
        for request, outcome in zip(requests_, await asyncio.gather(*asking), strict=True):
            check(request, outcome)


async def test_with_no_other_replica_a_stream_waits_for_the_next_one() -> None:
    async with play() as scene:
        request = generate(max_tokens=40)
        await scene.add("a", at_step=(9, lambda: scene.cluster.cut(APP, "a")))
        asking = asyncio.create_task(scene.ask(request))
        await until_real(lambda: "a" not in scene.cluster.endpoints[APP])
        assert not asking.done()
        late = await scene.add("b")
        check(request, await asyncio.wait_for(asking, 10))
        assert late.seen[0].emitted is not None
        assert scene.hand_overs == [("m", "lost")]


async def test_with_no_other_replica_a_stream_waits_no_longer_than_its_deadline() -> None:
    async with play() as scene:
        await scene.add("a", at_step=(9, lambda: scene.cluster.cut(APP, "a")))
        outcome = await scene.ask(generate(max_tokens=40, deadline_s=0.4))
        assert outcome.started
        assert outcome.deltas
        assert outcome.refused.code == "deadline_exceeded"


async def test_a_draining_replica_keeps_its_streams_until_another_comes_and_then_hands_them_over() -> None:
    async with play() as scene:
        request = generate(max_tokens=40)
        old = await scene.add("a", at_step=(9, lambda: old.link.close_gate()))
        old.link.close_gate()
        asking = asyncio.create_task(scene.ask(request))
        await until_real(lambda: len(old.link.sent) > 0)
        scene.drain("a")
        old.link.open_gate()
        await asyncio.wait_for(scene.answered.wait(), 10)
        new = await scene.add("b")
        check(request, await asyncio.wait_for(asking, 10))
        assert new.seen[0].emitted is not None
        assert new.seen[0].emitted[0].token_ids
        assert scene.hand_overs == [("m", "draining")]
        await until_real(lambda: old.engine.stats().num_requests_cancelled == 1)
        old.link.open_gate()


async def test_a_draining_replica_without_another_finishes_what_it_has() -> None:
    async with play() as scene:
        request = generate(max_tokens=40)
        await scene.add("a", at_step=(9, lambda: scene.drain("a")))
        check(request, await asyncio.wait_for(scene.ask(request), 10))


async def test_a_stream_never_goes_on_with_what_produces_other_tokens() -> None:
    async with play() as scene:
        request = generate(max_tokens=40)
        await scene.add("a", produces="bfloat16", at_step=(9, lambda: scene.drain("a")))
        other = await scene.add("b", produces="float32")
        scene.cluster.hide(APP, "b")
        check(request, await asyncio.wait_for(scene.ask(request), 10))
        assert not other.seen


async def test_a_stream_of_a_version_that_is_no_longer_routed_ends_on_that_version() -> None:
    async with play() as scene:
        old = await scene.add("a")
        await scene.add("b")
        request = generate(max_tokens=40)
        old.link.close_gate()
        scene.replicas["b"].link.close_gate()
        asking = asyncio.create_task(scene.ask(request))
        await until_real(lambda: any(replica.link.sent for replica in scene.replicas.values()))
        first = next(name for name, replica in scene.replicas.items() if replica.link.sent)
        await scene.add("new", app="m-v2")
        await asyncio.wait_for(scene.begun.wait(), 10)
        scene.router.replace(table(m=[("m-v2", 1.0)]))
        scene.cluster.cut(APP, first)
        for replica in scene.replicas.values():
            replica.link.open_gate()
        check(request, await asyncio.wait_for(asking, 10))
        assert not scene.replicas["new"].seen


async def test_a_stream_whose_version_is_gone_for_good_ends_with_an_explicit_error() -> None:
    async with play() as scene:
        old = await scene.add("a")
        old.link.close_gate()
        asking = asyncio.create_task(scene.ask(generate(max_tokens=40)))
        await until_real(lambda: bool(old.link.sent))
        await asyncio.wait_for(scene.begun.wait(), 10)
        scene.router.replace(table())
        scene.cluster.cut(APP, "a")
        old.link.open_gate()
        outcome = await asyncio.wait_for(asking, 10)
        assert outcome.refused.code == "draining"
        assert "no longer served" in outcome.refused.message


async def test_a_request_that_kills_replicas_is_given_up() -> None:
    async with play() as scene:
        for name in "abcdef":
            await scene.add(name, at_step=(1, lambda name=name: scene.cluster.cut(APP, name)))
        outcome = await asyncio.wait_for(scene.ask(generate(max_tokens=40)), 10)
        assert outcome.refused.code == "internal"
        assert "3 replicas in a row were lost" in outcome.refused.message
        assert sum(bool(replica.seen) for replica in scene.replicas.values()) == 3


class Embedder(EngineReplica):
    """Embeds, except that it never answers, or has no room for the first ``num_refusals``."""

    def __init__(self, *, answers: bool = True, num_refusals: int = 0) -> None:
        super().__init__()
        self.num_asked = 0
        self._answers = answers
        self._num_refusals = num_refusals

    async def embed(self, request: Embed):
        self.num_asked += 1
        if not self._answers:
            await asyncio.Event().wait()
        if self.num_asked <= self._num_refusals:
            raise RequestRefused(Refused(request_id=request.request_id, code="overloaded", message="full"))
        header = Embedded(request_id=request.request_id, num_vectors=1, dimensions=2, num_prompt_tokens=3)
        return header, np.ones((1, 2), dtype=np.float32)


async def test_an_embedding_is_asked_for_again_and_waits_for_room_that_it_had_before() -> None:
    async with play() as scene:
        lost, full = Embedder(answers=False), Embedder(num_refusals=2)
        await scene.cluster.add(APP, "a", lost)
        asking = asyncio.create_task(scene.router.embed("m", Embed(request_id="e", inputs=("x",), deadline_s=10.0)))
        await until_real(lambda: lost.num_asked == 1)
        await scene.cluster.add(APP, "b", full)
        scene.cluster.cut(APP, "a")
        _, vectors = await asyncio.wait_for(asking, 10)
        assert vectors.tolist() == [[1.0, 1.0]]
        assert full.num_asked == 3
        with pytest.raises(RequestRefused, match="full"):  # a new one has no such right
            full.num_asked = 0
            await scene.router.embed("m", Embed(request_id="f", inputs=("x",), deadline_s=10.0))


def test_losses_with_progress_in_between_are_borne_up_to_a_crowd() -> None:
    losses = Losses()
    assert [losses.count(num_tokens) for num_tokens in range(1, Losses.MAX)] == [None] * (Losses.MAX - 1)
    assert losses.count(99) == f"{Losses.MAX} replicas were lost over this request"


async def test_a_request_that_was_admitted_once_is_not_turned_away_for_want_of_room() -> None:
    settings_ = config(max_running=1, max_waiting=0)
    link = link_for(settings_)
    engine = Engine(settings_, TEXT, link)
    async with running(engine):
        link.close_gate()
        first = asyncio.create_task(collect(engine, generate("first")))
        await until(lambda: engine.load().num_running == 1)
        assert (await collect(engine, generate("fresh"))).refused.code == "overloaded"
        moved = generate_again(generate("moved"), 1, (EmittedChoice(),))
        second = asyncio.create_task(collect(engine, moved))
        await until(lambda: engine.load().num_waiting == 1)
        link.open_gate()
        check(generate("first"), await first)
        check(moved, await second)


@pytest.mark.parametrize(
    ("emitted", "reason"),
    [
        ((EmittedChoice((3,)), EmittedChoice()), "has 2 choices, but n is 1"),
        ((EmittedChoice((3,), True),), "leaves no choice"),
        ((EmittedChoice((3,) * 8),), "that has not ended"),
        ((EmittedChoice((3, 10**6)),), "token id outside"),
    ],
)
async def test_what_cannot_have_been_emitted_is_refused(emitted, reason) -> None:
    async with running(Engine(CONFIG, TEXT, link_for(CONFIG))) as engine:
        outcome = await collect(engine, generate_again(generate(), 1, emitted))
        assert outcome.refused.code == "invalid_request"
        assert reason in outcome.refused.message


async def test_a_token_that_only_the_model_knows_can_have_been_emitted() -> None:
    text = TextTokenizer(byte_level_tokenizer(), (EOS_ID,), num_embeddings=TEXT.vocab_size + 52)
    assert text.vocab_size == TEXT.vocab_size
    async with running(Engine(CONFIG, text, link_for(CONFIG))) as engine:
        emitted = (EmittedChoice((3, text.vocab_size + 51)),)
        assert (await collect(engine, generate_again(generate(), 1, emitted))).refused is None
        emitted = (EmittedChoice((3, text.vocab_size + 52)),)
        assert "token id outside" in (await collect(engine, generate_again(generate(), 1, emitted))).refused.message


async def until_real(condition: Callable[[], bool]) -> None:
    """Wait for something that needs the network, too."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_refusal_that_is_not_about_the_replica_is_the_clients() -> None:
    async with play() as scene:
        replicas = [await scene.add(name, max_running=1, max_waiting=0) for name in "ab"]
        await scene.router._pools[APP].refresh()
        for replica in replicas:
            replica.link.close_gate()
        asking = [asyncio.create_task(scene.ask(generate(f"r{i}"))) for i in range(2)]
        await until_real(lambda: all(replica.link.sent for replica in replicas))
        assert (await scene.ask(generate("third"))).refused.code == "overloaded"
        for replica in replicas:
            replica.link.open_gate()
        await asyncio.gather(*asking)


def test_a_template_that_tells_the_date_tells_every_replica_the_same(tmp_path: Path) -> None:
    template = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}: {{ messages[0]['content'] }}"
    byte_level_tokenizer(chat_template=template).save_pretrained(tmp_path)
    text = TextTokenizer.load(tmp_path)
    prompt = ChatPrompt(messages=({"role": "user", "content": "hi"},))
    progress = StreamProgress(msgspec.structs.replace(generate(), prompt=prompt))
    first, second = (progress.request(deadline_s).prompt for deadline_s in (5.0, 4.0))
    assert first == second
    long_ago = msgspec.structs.replace(first, asked_at=0.0)
    rendered = text.decode(text.encode(long_ago, request_id="r", context_tokens=99))
    assert rendered == f"{datetime.fromtimestamp(0.0):%Y-%m-%d %H:%M:%S}: hi"
