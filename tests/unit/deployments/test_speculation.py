"""Drafts change how many steps a text takes, and nothing else."""

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.messages import Sample, SamplingParams, SequenceStart, StageTiming, StepOutput
from deployments.replica.blocks import BlockPool
from deployments.replica.engine import Engine
from deployments.replica.scheduler import Scheduler, SchedulerConfig, StepMismatch
from deployments.replica.sequence import Sequence, SequenceState
from deployments.replica.speculation import NgramDrafter
from deployments.runtime.sample import Sampler
from tests.support.engine_runs import TEXT, check, collect, config, generate, link_for, running
from tests.support.fake_stage import SPELL_TOKENS

TIMING = StageTiming(0, 0.0, 0.0, 0.0)
VOCABULARY = 40


def reader(tokens: list[int], num_prompt_tokens: int) -> NgramDrafter:
    """A drafter that has read a prompt at once and the rest token by token."""
    drafter = NgramDrafter()
    for stop in range(num_prompt_tokens, len(tokens) + 1):
        drafter.read(tokens[:stop])
    return drafter


@pytest.mark.parametrize(
    ("tokens", "drafts"),
    [
        ([1, 2, 3, 9, 8, 7, 5, 1, 2, 3, 9, 8], (7, 5, 1, 2)),
        ([1, 2, 1, 2, 1, 2, 1, 2], (1, 2, 1, 2)),
        ([4, 4, 4, 4, 4, 4], (4, 4, 4, 4)),
        ([1, 2, 3, 4, 5, 6, 7, 8], None),
        ([1, 2, 3, 9, 5, 5, 1, 2, 3, 9], None),  # right once only
        ([1, 2, 3, 9, 8, 7, 5, 1, 2, 3, 9, 8, 6], None),  # right, then wrong
    ],
)
def test_a_text_that_repeats_itself_is_taken_to_go_on(tokens: list[int], drafts: tuple[int, ...] | None) -> None:
    drafter = reader(tokens, 2)
    assert drafter.is_confident == (drafts is not None)
    if drafts is not None:
        assert drafter.draft(tokens, 4) == drafts


def test_what_a_prompt_has_is_guessed_when_the_answer_quotes_it() -> None:
    tokens = [11, 12, 13, 14, 15, 16, 17, 99, 11, 12, 13, 14, 15]
    assert reader(tokens, 8).draft(tokens, 2) == (16, 17)


def test_of_a_long_prompt_the_end_is_remembered() -> None:
    begin, end = [11, 12, 13, 14, 15, 16, 17, 18], [21, 22, 23, 24, 25, 26, 27, 28]
    prompt = [*begin, *range(100, 5000), *end]
    quoted = [*prompt, 99, *end[:6]]
    assert reader(quoted, len(prompt)).draft(quoted, 2) == (27, 28)
    quoted = [*prompt, 99, *begin[:6]]
    assert not reader(quoted, len(prompt)).is_confident


def test_the_latest_continuation_counts() -> None:
    tokens = [1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 3, 5, 0]
    assert reader(tokens, 3).draft(tokens, 3) == (1, 2, 3)
    assert reader(tokens[:13], 3).draft(tokens[:13], 1) == (5,)


def test_nothing_is_drafted_where_the_end_is_new() -> None:
    tokens = [4, 4, 4, 4, 4, 4, 9]
    assert reader(tokens, 2).draft(tokens, 3) == ()


class Bench:
    """A scheduler over one stage and a sequence in mid-repetition: tokens 7, 8, 7, 8, ..."""

    def __init__(self, *, num_blocks: int = 64, max_tokens: int = 100, **limits) -> None:
        values = {"num_stages": 1, "max_running": 8, "max_step_tokens": 16, "speculative_tokens": 4}
        self.pool = BlockPool(num_blocks, 4, prefix_caching=True)
        self.scheduler = Scheduler(SchedulerConfig(**(values | limits)), self.pool)
        self.sequence = self.add(1, [1, 2, 3], max_tokens)
        while not self.sequence.drafter.is_confident:
            self.answer(self.scheduler.plan(), [7 + self.sequence.num_emitted % 2])

    def add(self, sequence_id: int, tokens: list[int], max_tokens: int = 100) -> Sequence:
        sequence = Sequence(
            sequence_id=sequence_id,
            tokens=list(tokens),
            num_prompt_tokens=len(tokens),
            sampling=SamplingParams(max_tokens=max_tokens),
            seed=0,
        )
        self.scheduler.add(sequence)
        return sequence

    def answer(self, step, token_ids: list[int]) -> None:
        samples = tuple(Sample(1, token_id) for token_id in token_ids)
        self.scheduler.complete(StepOutput(step=step.step, samples=samples, timing=TIMING))
        self.pool.check_integrity([sequence.blocks for sequence in self.scheduler.running])


def test_a_step_takes_drafts_along_and_goes_on_behind_those_that_were_right() -> None:
    bench = Bench()
    step = bench.scheduler.plan()
    (part,) = step.sequences
    last = bench.sequence.tokens[-1]
    assert part.drafts == (15 - last, last, 15 - last, last)
    assert part.token_ids == (last, *part.drafts)
    assert bench.scheduler.plan() is None, "where it goes on is not known before the answer"
    bench.answer(step, [part.drafts[0], part.drafts[1], 3])
    (after,) = bench.scheduler.plan().sequences
    assert (after.position, after.token_ids) == (part.position + 3, (3,)), (
        "two drafts were right, and none is made now"
    )
    assert (bench.scheduler.num_draft_tokens, bench.scheduler.num_accepted_tokens) == (4, 2)


@pytest.mark.parametrize(("max_tokens", "num_drafts"), [(8, 0), (9, 1), (11, 3), (20, 4)])
def test_no_more_is_drafted_than_may_be_emitted(max_tokens: int, num_drafts: int) -> None:
    bench = Bench(max_tokens=max_tokens)
    assert bench.sequence.num_emitted == 7
    assert bench.scheduler.plan().sequences[0].num_drafts == num_drafts


def test_drafts_stay_within_the_budget_and_out_of_steps_with_prompts() -> None:
    bench = Bench(max_step_tokens=4)
    assert bench.scheduler.plan().sequences[0].num_drafts == 3
    bench = Bench(max_step_tokens=16)
    bench.add(2, list(range(20, 30)))
    decoding, prompt = bench.scheduler.plan().sequences
    assert (decoding.num_drafts, prompt.num_tokens) == (0, 10)


def test_prompts_that_cannot_begin_yet_keep_nobody_from_drafting() -> None:
    bench = Bench(max_running=1)
    bench.add(2, list(range(20, 30)))
    assert bench.scheduler.plan().sequences[0].num_drafts == 4


def test_the_drafts_of_a_step_are_no_more_than_the_sequences_it_may_have() -> None:
    bench = Bench(max_running=2, speculative_tokens=3, max_step_tokens=64)
    assert bench.scheduler.plan().sequences[0].num_drafts == 3, "one sequence may have all it wants"
    link = link_for(settings_ := config(max_running=4, speculative_tokens=3, max_step_tokens=64, num_blocks=128), 1)
    requests = [generate(f"r{i}", range(2, 5 + i), max_tokens=40, logit_bias={0: 1.0}) for i in range(4)]

    async def serve() -> None:
        async with running(Engine(settings_, TEXT, link)) as engine:
            await asyncio.gather(*(collect(engine, each) for each in requests))

    asyncio.run(serve())
    assert max(sum(part.num_drafts for part in step.sequences) for step in link.sent) == 4


def test_nobody_loses_blocks_for_a_draft() -> None:
    bench = Bench(num_blocks=3)
    assert len(bench.sequence.tokens) == 10
    assert bench.scheduler.plan().sequences[0].num_drafts == 2, "three blocks have 12 positions"
    assert bench.scheduler.num_preemptions == 0


def test_a_sequence_that_ends_or_starts_anew_with_drafts_in_flight_leaves_nothing_behind() -> None:
    bench = Bench()
    step = bench.scheduler.plan()
    bench.scheduler.end(bench.sequence)
    bench.answer(step, [7, 8])
    assert bench.pool.num_used == 0
    bench = Bench()
    step = bench.scheduler.plan()
    bench.scheduler.reset()
    assert bench.sequence.state is SequenceState.WAITING
    assert bench.scheduler.plan().sequences[0].token_ids == tuple(bench.sequence.tokens)


@pytest.mark.parametrize("token_ids", [[], [7] * 6])
def test_too_many_or_no_samples_are_noticed(token_ids: list[int]) -> None:
    bench = Bench()
    step = bench.scheduler.plan()
    with pytest.raises(StepMismatch, match="expected"):
        bench.answer(step, token_ids)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_repetitions_take_fewer_steps_and_give_the_same_answers(num_stages: int, temperature: float) -> None:
    requests = [
        generate(f"r{i}", range(2, 5 + i), max_tokens=44, n=1 + i % 2, logit_bias={0: 1.0 + i % 3}, logprobs=0,
                 temperature=temperature, seed=i, stop=("&(",) if i % 2 else ())
        for i in range(4)
    ]  # fmt: skip
    num_steps = []
    for speculative_tokens in (0, 6):
        settings_ = config(speculative_tokens=speculative_tokens, num_blocks=128, max_step_tokens=64)
        link = link_for(settings_, num_stages)
        async with running(Engine(settings_, TEXT, link)) as engine:
            for request, outcome in zip(
                requests, await asyncio.gather(*(collect(engine, each) for each in requests)), strict=True
            ):
                check(request, outcome)
            stats = engine.stats()
        num_steps.append(stats.num_steps)
        assert (stats.num_draft_tokens, stats.num_accepted_tokens) == (link.num_drafts, link.num_right)
        assert (0 < link.num_right < link.num_drafts) == bool(speculative_tokens), f"spells end: {SPELL_TOKENS}"
    assert num_steps[1] < num_steps[0]


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_drafts_never_change_what_is_chosen(data: st.DataObject) -> None:
    """Rows of logits that depend on what was chosen before, as a model's do; drafts right and wrong."""
    params = SamplingParams(
        max_tokens=64,
        temperature=data.draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_p=data.draw(st.sampled_from([1.0, 0.8])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.4])),
        frequency_penalty=data.draw(st.sampled_from([0.0, 0.9])),
        min_tokens=data.draw(st.sampled_from([0, 4])),
        logprobs=data.draw(st.sampled_from([None, 2])),
    )
    start = SequenceStart(1, (3, 4), 2, params, data.draw(st.integers(0, 99)), 0, (2,))

    def row(tokens: list[int]) -> torch.Tensor:
        return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)) * 2

    alone, expected, tokens = Sampler(), [], [3, 4]
    alone.start(start)
    for _ in range(24):
        expected += alone.sample([1], row(tokens)[None])
        tokens.append(expected[-1].token_id)
    sampler, samples = Sampler(), []
    sampler.start(start)
    sampler.start(SequenceStart(2, (9,), 1, SamplingParams(max_tokens=9, temperature=0.0), 0, 0, ()))
    while len(samples) < 20:
        so_far = tokens[: 2 + len(samples)]
        drafts = tokens[len(so_far) :][: data.draw(st.integers(0, 4))]
        if drafts and data.draw(st.booleans()):
            drafts[data.draw(st.integers(0, len(drafts) - 1))] = 39
        rows = [row([*so_far, *drafts[:stop]]) for stop in range(len(drafts) + 1)]
        *taken, other = sampler.sample([1, 2], torch.stack([*rows, row([9])]), {1: tuple(drafts)})
        assert other.sequence_id == 2
        samples += taken
    assert samples == expected[: len(samples)]
