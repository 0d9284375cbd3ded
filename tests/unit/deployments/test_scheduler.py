import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.messages import Sample, SamplingParams, StageTiming, StepOutput
from deployments.replica.blocks import BlockPool
from deployments.replica.scheduler import Scheduler, SchedulerConfig, StepMismatch, decode_share, prefill_share
from deployments.replica.sequence import Sequence, SequenceState

TIMING = StageTiming(0, 0.0, 0.0, 0.0)


class Bench:
    """A scheduler with its pool, and stages that answer token 1 whenever asked.

    Runs ahead only in the tests that ask for it: the others are about what a step is made of.
    """

    def __init__(self, *, num_blocks=64, block_tokens=4, prefix_caching=True, **limits):
        values = {"num_stages": 2, "max_running": 8, "max_step_tokens": 16, "min_decode_split": 1, "steps_ahead": 0}
        self.pool = BlockPool(num_blocks, block_tokens, prefix_caching=prefix_caching)
        self.scheduler = Scheduler(SchedulerConfig(**(values | {"min_prefill_chunk": 4} | limits)), self.pool)
        self.steps = []
        self._next_id = 1

    def add(self, num_tokens, *, first=100, leader=None, max_tokens=100):
        """A sequence with a prompt that no other shares, unless ``first`` is repeated."""
        sequence = Sequence(
            sequence_id=self._next_id,
            tokens=list(range(first, first + num_tokens)),
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(max_tokens=max_tokens),
            seed=0,
            leader=leader,
        )
        self._next_id += 1
        self.scheduler.add(sequence)
        return sequence

    def plan(self):
        """The next step as {sequence id: number of tokens}; None when there is none."""
        step = self.scheduler.plan()
        self.check()
        if step is None:
            return None
        self.steps.append(step)
        for part in step.sequences:
            assert len(part.block_ids) * self.pool.block_tokens >= part.position + part.num_tokens
        assert sum(part.num_tokens for part in step.sequences) <= self.scheduler.config.max_step_tokens
        assert len(self.steps) <= self.scheduler.config.max_in_flight
        return {part.sequence_id: part.num_tokens for part in step.sequences}

    def fill(self):
        """Plan until the pipeline is full or nothing can run."""
        planned = []
        while (step := self.plan()) is not None:
            planned.append(step)
        return planned

    def answer(self):
        """The stages answer the oldest step; returns the ids of the sequences that got a token."""
        step = self.steps.pop(0)
        samples = tuple(Sample(part.sequence_id, 1) for part in step.sequences if part.sample)
        taken = self.scheduler.complete(StepOutput(step=step.step, samples=samples, timing=TIMING))
        self.check()
        return [sequence.sequence_id for sequence, _ in taken]

    def check(self):
        self.pool.check_integrity([sequence.blocks for sequence in self.scheduler.running])


def test_the_shares_policy_is_one_table():
    config = SchedulerConfig(
        num_stages=2, max_running=64, max_step_tokens=32, min_decode_split=2, min_prefill_chunk=8
    )
    assert [decode_share(config, number, prompts_wait=False) for number in (1, 2, 3, 4, 5, 8, 100)] == [
        1, 2, 3, 2, 3, 4, 32,
    ]  # fmt: skip
    assert decode_share(config, 100, prompts_wait=True) == 28
    assert [prefill_share(config, number) for number in (0, 5, 15, 16, 40, 64, 640)] == [0, 5, 15, 8, 8, 8, 80]
    assert prefill_share(replace(config, num_stages=1), 640) == 640


def test_decoding_is_spread_over_the_stages():
    bench = Bench()
    for index in range(8):
        bench.add(2, first=10 * index)
    bench.fill()
    bench.answer(), bench.answer()
    assert [len(step) for step in bench.fill()] == [4, 4]
    bench.answer()
    assert [len(step) for step in bench.fill()] == [4]


def test_uneven_micro_batches_even_out():
    bench = Bench(max_step_tokens=64)
    first = [bench.add(2, first=10 * index) for index in range(6)]
    bench.fill()
    for _ in range(4):
        bench.answer()
        bench.fill()
    for sequence in first[:3]:
        bench.scheduler.end(sequence)
    sizes = []
    for _ in range(6):
        bench.answer()
        sizes += [len(step) for step in bench.fill()]
    assert sorted(sizes[-2:]) == [1, 2]


def test_a_long_prompt_is_cut_to_the_budget_and_its_chunks_follow_each_other():
    bench = Bench(max_step_tokens=16, min_prefill_chunk=64)
    bench.add(50)
    assert bench.fill() == [{1: 16}, {1: 16}]
    assert bench.answer() == []
    assert bench.fill() == [{1: 16}]
    assert bench.answer() == []
    assert bench.fill() == [{1: 2}]
    assert (bench.answer(), bench.answer()) == ([], [1])
    assert bench.fill() == [{1: 1}]


def test_stages_share_a_prompt_in_small_parts_and_one_stage_takes_it_whole():
    bench = Bench(max_step_tokens=64)
    bench.add(40)
    assert bench.fill() == [{1: 5}, {1: 5}]
    bench = Bench(num_stages=1, max_step_tokens=64)
    bench.add(40)
    assert bench.fill() == [{1: 40}]


def test_every_micro_batch_takes_an_equal_part_of_a_prompt_beside_its_decoding():
    bench = Bench(max_step_tokens=64, steps_ahead=1)
    for index in range(4):
        bench.add(2, first=10 * index)
    for _ in range(6):
        bench.fill()
        bench.answer()
    bench.add(64, first=500)
    planned = []
    for _ in range(8):
        planned += bench.fill()
        bench.answer()
    assert [step[5] for step in planned if 5 in step][:8] == [8] * 8
    assert {len(step) for step in planned[:8]} == {3}, "two that decode and a part of the prompt"


def test_decoding_goes_on_while_a_long_prompt_is_computed():
    bench = Bench(num_stages=1, max_step_tokens=8, num_blocks=64)
    bench.add(2)
    bench.fill()
    bench.answer()
    bench.add(100, first=500)
    for _ in range(10):
        assert bench.fill() == [{1: 1, 2: 7}]
        assert bench.answer() == [1]


def test_a_prompt_goes_on_while_decoding_could_take_the_whole_budget():
    bench = Bench(num_stages=1, max_step_tokens=8, max_running=16)
    for index in range(12):
        bench.add(1, first=1000 + index)
    for _ in range(12):
        bench.fill()
        bench.answer()
    late = bench.add(5, first=2000)
    for _ in range(5):
        assert late.sequence_id in bench.fill()[0]
        bench.answer()
    assert late.num_emitted == 1


def test_every_decoding_sequence_gets_its_turn_under_a_small_budget():
    bench = Bench(num_stages=1, max_step_tokens=4, max_running=16)
    sequences = [bench.add(1, first=1000 + index) for index in range(10)]
    for _ in range(15):
        bench.fill()
        bench.answer()
    before = [sequence.num_emitted for sequence in sequences]
    for _ in range(25):
        bench.fill()
        bench.answer()
    assert [sequence.num_emitted - earlier for sequence, earlier in zip(sequences, before, strict=True)] == [10] * 10


def test_admission_is_in_order_of_arrival_and_a_big_head_is_not_overtaken():
    bench = Bench(num_blocks=10, num_stages=1)
    running = bench.add(20)
    bench.fill()
    big = bench.add(24, first=500)
    small = bench.add(2, first=900)
    for _ in range(3):
        bench.answer()
        bench.fill()
    assert (big.state, small.state) == (SequenceState.WAITING, SequenceState.WAITING)
    bench.scheduler.end(running)
    bench.answer()
    bench.fill()
    assert big.state is SequenceState.RUNNING


def test_no_more_run_than_allowed():
    bench = Bench(max_running=3)
    for index in range(5):
        bench.add(2, first=10 * index)
    bench.fill()
    assert bench.scheduler.num_running == 3
    assert [sequence.sequence_id for sequence in bench.scheduler.waiting] == [4, 5]


def test_out_of_blocks_the_youngest_gives_way_and_comes_back():
    bench = Bench(num_blocks=6, num_stages=1, prefix_caching=False)
    old, young = bench.add(7), bench.add(7, first=500)
    for _ in range(7):
        bench.fill()
        bench.answer()
    assert (old.state, young.state) == (SequenceState.RUNNING, SequenceState.WAITING)
    assert (young.num_emitted, young.num_computed, young.blocks) == (6, 0, ())
    assert bench.scheduler.num_preemptions == 1
    bench.scheduler.end(old)
    assert bench.fill() == [{2: 13}]
    step = bench.steps[-1]
    assert step.ended == (1,), "the preempted one was reported as ended before"
    assert step.started[0].token_ids == tuple(young.tokens)
    assert (step.started[0].num_prompt_tokens, step.sequences[0].position) == (7, 0)


def test_one_that_gives_up_its_own_blocks_lets_another_go_on():
    bench = Bench(num_stages=1, num_blocks=6, prefix_caching=False, max_step_tokens=2)
    old, young = bench.add(6), bench.add(6, first=500)
    bench.add(20, first=900)  # waits, so that only one sequence decodes in a step
    while young.state is not SequenceState.WAITING or young.num_emitted == 0:
        assert bench.plan() is not None, "somebody is ready, and there is room"
        bench.answer()
    assert old.num_emitted > young.num_emitted


def test_a_preempted_sequence_takes_its_sample_in_flight_and_only_then_comes_back():
    bench = Bench(num_blocks=7, num_stages=3, max_step_tokens=32, prefix_caching=False)
    other, old, young = bench.add(3), bench.add(8, first=300), bench.add(3, first=500)
    bench.fill()
    while bench.steps:
        bench.answer()
    step_of_young = None
    while young.state is SequenceState.RUNNING:
        if bench.plan() is None:
            bench.answer()
        elif step_of_young is None or young.sample_steps:
            step_of_young = list(young.sample_steps)
    assert young.sample_steps == step_of_young != [], "it lost its blocks while its sample was in flight"
    bench.scheduler.end(other)
    num_emitted = young.num_emitted
    while young.sample_steps:
        assert young.state is SequenceState.WAITING
        if bench.plan() is None:
            bench.answer()
    assert young.num_emitted == num_emitted + 1
    bench.scheduler.end(old)
    while young.num_emitted == num_emitted + 1:
        if bench.plan() is None:
            bench.answer()
    assert young.num_emitted == num_emitted + 2


def test_a_newcomer_leaves_room_for_those_who_run():
    bench = Bench(num_blocks=6, num_stages=1)
    bench.add(8)
    bench.fill()
    bench.answer()
    newcomer = bench.add(16, first=500)
    bench.fill()
    assert newcomer.state is SequenceState.WAITING, "four blocks are free, but one of them is for the other to grow"


def test_siblings_wait_for_the_leaders_prompt_and_let_others_pass():
    bench = Bench(max_step_tokens=8, num_stages=1)
    leader = bench.add(10)
    siblings = [bench.add(10, leader=leader), bench.add(10, leader=leader)]
    other = bench.add(3, first=500)
    assert bench.fill() == [{1: 8}]
    bench.answer()
    assert bench.fill() == [{1: 2, 4: 3}]
    assert [sibling.num_cached for sibling in siblings] == [None, None]
    bench.answer()
    assert bench.fill() == [{1: 1, 4: 1, 2: 2, 3: 2}]
    assert [sibling.num_cached for sibling in siblings] == [8, 8]
    assert other.num_emitted == 1


def test_siblings_of_a_leader_that_left_compute_for_themselves():
    bench = Bench(num_stages=1)
    leader = bench.add(10)
    bench.add(10, leader=leader)
    bench.scheduler.end(leader)
    assert bench.fill() == [{2: 10}]


def test_equal_prompts_of_one_step_share_nothing_those_of_the_next_step_do():
    bench = Bench(num_stages=2, max_step_tokens=64, min_prefill_chunk=64)
    bench.add(9), bench.add(9)
    assert bench.fill() == [{1: 9, 2: 9}]
    tables = [part.block_ids for part in bench.steps[0].sequences]
    assert not set(tables[0]) & set(tables[1])
    third = bench.add(9)
    assert bench.fill() == [{3: 1}], "the step that computes the shared blocks is still in flight, but ahead"
    assert third.blocks[:2] == tables[0][:2]


def test_ending_frees_blocks_while_the_step_is_in_flight_and_its_sample_is_dropped():
    bench = Bench()
    sequence = bench.add(3)
    bench.fill()
    bench.scheduler.end(sequence)
    assert bench.pool.num_used == 0
    assert bench.answer() == []
    bench.add(3, first=500)
    bench.fill()
    assert bench.steps[0].ended == (1,)


def test_a_sequence_that_never_ran_ends_in_silence():
    bench = Bench()
    sequence = bench.add(3)
    bench.scheduler.end(sequence)
    bench.add(3, first=500)
    bench.fill()
    assert bench.steps[0].ended == ()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.integers(8, 16),
    st.integers(2, 12),
    st.booleans(),
    st.sampled_from([0, 1]),
)
def test_under_any_load_and_few_blocks_everybody_comes_to_an_end(
    seed, num_stages, num_blocks, budget, prefix_caching, steps_ahead
):
    rng = random.Random(seed)
    bench = Bench(
        num_stages=num_stages,
        num_blocks=num_blocks,
        max_step_tokens=budget,
        prefix_caching=prefix_caching,
        max_running=5,
        steps_ahead=steps_ahead,
    )
    alive = []
    for _ in range(12):
        alive.append(bench.add(rng.randint(1, 12), first=rng.choice([100, 200])))
        for _ in range(rng.randrange(4)):
            if bench.plan() is None and bench.steps:
                bench.answer()
            if alive and rng.random() < 0.1:
                bench.scheduler.end(alive.pop(rng.randrange(len(alive))))
    for _ in range(5000):
        if bench.plan() is None and bench.steps:
            bench.answer()
        for sequence in [sequence for sequence in alive if sequence.num_emitted >= 20]:
            bench.scheduler.end(sequence)
            alive.remove(sequence)
        if not alive:
            break
    assert not alive
    assert bench.pool.num_used == 0


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_no_more_steps_in_flight_than_stages_and_those_ahead(num_stages, steps_ahead):
    bench = Bench(num_stages=num_stages, min_prefill_chunk=1, steps_ahead=steps_ahead, max_step_tokens=8)
    bench.add(40)
    assert len(bench.fill()) == num_stages + steps_ahead


def test_running_ahead_asks_for_the_position_after_a_token_that_is_being_chosen():
    bench = Bench(num_stages=1, steps_ahead=1)
    bench.add(3), bench.add(3, first=500)
    assert bench.fill() == [{1: 3, 2: 3}, {1: 1, 2: 1}]
    ahead = bench.steps[1].sequences
    assert [(part.token_ids, part.chosen_in, part.position, part.sample) for part in ahead] == [((), 1, 3, True)] * 2
    assert bench.answer() == [1, 2]
    assert bench.fill() == [{1: 1, 2: 1}]
    assert [part.chosen_in for part in bench.steps[1].sequences] == [2, 2]


def test_a_sequence_known_to_end_with_the_token_being_chosen_does_not_run_ahead():
    bench = Bench(num_stages=1, steps_ahead=1)
    last, other = bench.add(3, max_tokens=2), bench.add(3, first=500)
    bench.fill()
    assert bench.answer() == [1, 2]
    assert bench.fill() == [{2: 1}]
    assert bench.answer() == [1, 2]
    assert (last.num_emitted, other.num_emitted) == (2, 2)


def test_micro_batches_alternate_and_the_third_step_runs_ahead_of_the_first():
    bench = Bench(num_stages=2, steps_ahead=1, max_step_tokens=64, min_prefill_chunk=64)
    for index in range(4):
        bench.add(2, first=10 * index)
    bench.plan()
    bench.answer()
    planned = bench.fill()
    assert [sorted(step) for step in planned] == [[1, 2], [3, 4], [1, 2]]
    assert [part.chosen_in for part in bench.steps[2].sequences] == [bench.steps[0].step] * 2
    bench.answer()
    assert [sorted(step) for step in bench.fill()] == [[3, 4]]


def test_no_micro_batch_waits_for_another_that_is_still_in_the_pipeline():
    bench = Bench(num_stages=2, steps_ahead=1, max_step_tokens=64, min_prefill_chunk=64)
    for index in range(5):
        bench.add(2, first=10 * index)
    bench.plan()
    bench.answer()
    assert [sorted(step) for step in bench.fill()] == [[1, 2, 3], [4, 5], [1, 2, 3]]


def test_a_prompt_is_not_held_up_by_a_token_that_is_still_being_chosen():
    bench = Bench(num_stages=2, steps_ahead=1, min_prefill_chunk=64, max_step_tokens=64)
    bench.add(3)
    bench.plan()
    bench.add(3, first=500)
    assert bench.fill() == [{2: 3}, {1: 1}]


def test_one_sequence_alone_runs_ahead_through_any_number_of_stages():
    bench = Bench(num_stages=3, steps_ahead=1)
    bench.add(3)
    assert bench.fill() == [{1: 3}, {1: 1}], "one token ahead and no further: it would wait in any case"


def test_what_ran_ahead_of_an_end_is_dropped_and_its_blocks_are_free_for_the_next_step():
    bench = Bench(num_stages=1, num_blocks=2, steps_ahead=1, prefix_caching=False)
    ended = bench.add(7)
    bench.fill()
    wasted = bench.steps[1].sequences[0]
    assert wasted.position == 7
    assert bench.answer() == [1]
    bench.scheduler.end(ended)
    bench.add(7, first=500)
    assert bench.fill() == [{2: 7}], "steps run in order: the wasted one writes before this one does"
    assert set(bench.steps[-1].sequences[0].block_ids) == set(wasted.block_ids)
    assert bench.answer() == [], "nobody wants the wasted sample"
    assert bench.steps[-1].ended == (1,)


def test_both_samples_in_flight_of_a_preempted_sequence_are_taken_before_it_comes_back():
    bench = Bench(num_stages=1, num_blocks=5, steps_ahead=1, prefix_caching=False, max_step_tokens=32)
    old, young = bench.add(6), bench.add(6, first=500)
    bench.fill()
    assert young.state is SequenceState.RUNNING
    while young.state is SequenceState.RUNNING:
        if bench.plan() is None:
            bench.answer()
    num_emitted, num_in_flight = young.num_emitted, len(young.sample_steps)
    bench.scheduler.end(old)
    assert num_in_flight == 1, "the youngest loses its blocks in a plan, when at most one step is in flight"
    while young.state is SequenceState.WAITING:
        if bench.plan() is None:
            bench.answer()
    assert young.num_emitted == num_emitted + num_in_flight
    assert bench.steps[-1].started[0].token_ids == tuple(young.tokens)


def test_a_block_is_registered_only_when_its_last_token_is_known():
    bench = Bench(num_stages=1, steps_ahead=1, num_blocks=64)
    bench.add(3)
    assert bench.fill() == [{1: 3}, {1: 1}]
    twin = bench.add(9)
    assert bench.answer() == [1]
    assert twin.num_cached is None
    bench.fill()
    bench.answer()
    assert bench.scheduler._pool.match_prefix(bench.scheduler.running[0].digests), "its token has come"


def test_reset_makes_everything_wait_again_in_order_of_age():
    bench = Bench()
    for index in range(3):
        bench.add(6, first=100 * index)
    bench.fill()
    bench.answer()
    bench.scheduler.reset(num_stages=1)
    assert [sequence.sequence_id for sequence in bench.scheduler.waiting] == [1, 2, 3]
    assert bench.pool.num_used == bench.scheduler.num_in_flight == 0
    bench.steps.clear()
    bench.fill()
    assert len(bench.steps) == 1
    assert [start.sequence_id for start in bench.steps[0].started] == [1, 2, 3][: len(bench.steps[0].started)]
    assert bench.steps[0].ended == ()


@pytest.mark.parametrize("wrong", ["step", "sequences", "nothing in flight"])
def test_answers_to_other_questions_are_noticed(wrong):
    bench = Bench()
    bench.add(3)
    if wrong != "nothing in flight":
        bench.fill()
    sample = Sample(2 if wrong == "sequences" else 1, 1)
    with pytest.raises(StepMismatch):
        bench.scheduler.complete(StepOutput(step=2 if wrong == "step" else 1, samples=(sample,), timing=TIMING))


@pytest.mark.parametrize("limit", ["num_stages", "max_running", "max_step_tokens", "min_decode_split"])
def test_limits_under_which_nothing_runs_are_refused(limit):
    with pytest.raises(ValueError, match=f"{limit} is 0"):
        Bench(**{limit: 0})
    with pytest.raises(ValueError, match="at least 2"):
        Bench(max_step_tokens=1)
