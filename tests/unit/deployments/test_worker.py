"""Stages over real channels: steps that run ahead of the token being chosen, and what each stage measures."""

import asyncio

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deployments.channel import Channel, Listener
from deployments.messages import Sample, SamplingParams, SequenceStart, SequenceStep, StageFailed, StepInput
from deployments.stage.compact import StepCompactor, StepExpander
from deployments.stage.link import StageAddress, StageLink
from tests.support.local_stages import serve_stages


class AddingRunner:
    """Every stage adds one to each token; the last one chooses what comes out for a sequence's last token."""

    def __init__(self, *, is_first: bool, is_last: bool) -> None:
        self._is_first = is_first
        self._is_last = is_last
        self.seen: list[StepInput] = []

    def run(self, step: StepInput, hidden: torch.Tensor | None) -> torch.Tensor | list[Sample]:
        self.seen.append(step)
        if hidden is None:
            ids = [token_id for part in step.sequences for token_id in part.token_ids]
            hidden = torch.tensor(ids, dtype=torch.float32)[:, None]
        hidden = hidden + 1
        if not self._is_last:
            return hidden
        samples, stop = [], 0
        for part in step.sequences:
            stop += part.num_tokens
            if part.sample:
                samples.append(Sample(part.sequence_id, int(hidden[stop - 1])))
        return samples


def runners(num_stages: int) -> list[AddingRunner]:
    return [AddingRunner(is_first=i == 0, is_last=i == num_stages - 1) for i in range(num_stages)]


def start(sequence_id: int, *token_ids: int) -> SequenceStart:
    return SequenceStart(sequence_id, token_ids, len(token_ids), SamplingParams(max_tokens=64), 0, 0, ())


def step(number: int, *parts: SequenceStep, started: tuple[SequenceStart, ...] = ()) -> StepInput:
    return StepInput(step=number, sequences=parts, started=started)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
async def test_a_step_gets_the_tokens_that_earlier_steps_chose(num_stages: int) -> None:
    async with serve_stages(runners(num_stages)) as (link, _):
        prompts = (SequenceStep(1, (10, 20), 0, (0,), True), SequenceStep(2, (30,), 0, (1,), True))
        await link.send(step(1, *prompts, started=(start(1, 10, 20), start(2, 30))))
        await link.send(step(2, SequenceStep(1, (), 2, (0,), True, 1), SequenceStep(3, (7,), 0, (2,), False),
                             started=(start(3, 7, 8),)))  # fmt: skip
        await link.send(step(3, SequenceStep(2, (), 1, (1, 5), True, 1), SequenceStep(1, (), 3, (0,), True, 2)))
        outputs = [await link.receive() for _ in range(3)]
    chosen = [{sample.sequence_id: sample.token_id for sample in output.samples} for output in outputs]
    assert chosen == [
        {1: 20 + num_stages, 2: 30 + num_stages},
        {1: 20 + 2 * num_stages},
        {2: 30 + 2 * num_stages, 1: 20 + 3 * num_stages},
    ]


async def test_a_block_table_arrives_whole_although_only_new_blocks_are_sent() -> None:
    (runner,) = stages = runners(1)
    async with serve_stages(stages) as (link, _):
        await link.send(step(1, SequenceStep(1, (10,), 0, (4, 9), True), started=(start(1, 10),)))
        await link.send(step(2, SequenceStep(1, (), 1, (4, 9), True, 1)))
        await link.send(step(3, SequenceStep(1, (), 2, (4, 9, 2), True, 2)))
        for _ in range(3):
            await link.receive()
    assert [seen.sequences[0].block_ids for seen in runner.seen] == [(4, 9), (4, 9), (4, 9, 2)]
    assert [seen.sequences[0].token_ids for seen in runner.seen] == [(10,), (11,), (12,)]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (SequenceStep(1, (), 1, (0,), True, 7), "KeyError"),
        (SequenceStep(1, (), 1, (0,), True, None), "nothing to compute"),
    ],
)
async def test_a_step_that_cannot_be_put_together_is_reported(part: SequenceStep, words: str) -> None:
    class Strict(AddingRunner):
        def run(self, step: StepInput, hidden: torch.Tensor | None) -> torch.Tensor | list[Sample]:
            if not step.sequences[0].token_ids:
                raise ValueError("nothing to compute")
            return super().run(step, hidden)

    async with serve_stages([Strict(is_first=True, is_last=True)]) as (link, _):
        await link.send(step(1, SequenceStep(1, (10,), 0, (0,), True), started=(start(1, 10),)))
        assert not isinstance(await link.receive(), StageFailed)
        await link.send(step(2, part))
        failed = await link.receive()
    assert isinstance(failed, StageFailed)
    assert (failed.step, words in failed.message) == (2, True)


async def test_a_wait_counts_as_a_bubble_only_while_the_pipeline_has_work() -> None:
    loop = asyncio.get_running_loop()
    async with serve_stages(runners(1)) as (link, _):
        await link.send(step(1, SequenceStep(1, (10,), 0, (0,), True), started=(start(1, 10),)))
        first = (await link.receive()).timing
        begin = loop.time()
        while loop.time() - begin < 0.05:  # nothing is under way: not the pipeline's fault
            await asyncio.sleep(0)
        await link.send(step(2, SequenceStep(1, (11,), 1, (0,), True)))
        await link.send(step(3, SequenceStep(1, (), 2, (0,), True, 2)))
        second, third = (await link.receive()).timing, (await link.receive()).timing
    assert first.bubble_s < first.wait_s
    assert second.bubble_s < second.wait_s
    assert third.bubble_s == pytest.approx(third.wait_s)


tables = st.lists(st.lists(st.integers(0, 50), max_size=6), min_size=1, max_size=4)


@given(tables, st.data())
def test_what_is_compacted_expands_to_the_same(growth: list[list[int]], data: st.DataObject) -> None:
    compactor, expander = StepCompactor(), StepExpander()
    known: dict[int, tuple[int, ...]] = {}
    for number, new_blocks in enumerate(growth):
        ended = tuple(data.draw(st.sets(st.sampled_from(sorted(known)))) if known else ())
        for sequence_id in ended:
            del known[sequence_id]
        started = tuple(start(i, 1) for i in range(3) if i not in known and data.draw(st.booleans()))
        known |= {each.sequence_id: () for each in started}
        known = {sequence_id: (*blocks, *new_blocks) for sequence_id, blocks in known.items()}
        parts = tuple(SequenceStep(i, (i,), number, blocks, True) for i, blocks in known.items())
        sent = StepInput(step=number, sequences=parts, started=started, ended=ended)
        assert expander.expand(compactor.compact(sent, follows=False)) == sent


def test_a_sequence_that_was_never_started_is_refused() -> None:
    compactor = StepCompactor()
    compacted = compactor.compact(
        step(1, SequenceStep(1, (5,), 0, (0,), True), started=(start(1, 5),)), follows=False
    )
    with pytest.raises(ValueError, match="sequence 1, which was never started"):
        StepExpander().expand(type(compacted)(step=2, parts=compacted.parts, follows=True))


async def test_a_failure_is_told_even_when_the_neighbours_end_is_seen_first() -> None:
    channels: list[asyncio.Future[Channel]] = [asyncio.get_running_loop().create_future() for _ in range(2)]
    done = asyncio.Event()

    def listener(index: int) -> Listener:
        async def hold(channel: Channel) -> None:
            await channel.receive()
            channels[index].set_result(channel)
            await done.wait()

        return Listener(hold)

    listeners = [listener(0), listener(1)]
    stages = [StageAddress(address=await each.start("127.0.0.1"), secret=each.secret) for each in listeners]
    link = await StageLink.connect(stages, step_timeout_s=30.0)
    first, second = [await channel for channel in channels]
    first.close()
    await link.wait_lost()
    await second.send(StageFailed(step=4, message="it broke"))
    second.close()
    while link._results.qsize() < 2:
        await asyncio.sleep(0)
    assert await link.receive() == StageFailed(step=4, message="it broke")
    done.set()
    await link.close()
    for each in listeners:
        await each.stop()
