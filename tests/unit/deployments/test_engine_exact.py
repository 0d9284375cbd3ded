"""The engine over real stages gives transformers' own tokens, whatever company, cache, chunking or preemption."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from deployments.messages import Delta, Generate, SamplingParams, TokenPrompt
from deployments.replica.engine import Engine, EngineConfig
from tests.support.local_stages import load_runners, serve_stages
from tests.support.tiny_models import greedy, save_tiny_model
from tests.support.tiny_tokenizer import tiny_text

BLOCK_TOKENS = 4
SHARED = list(range(20, 60))
PROMPTS = [
    [5, 9, 200, 31],
    [17, 44, 3, 90, 12, 250, 8, 77, 61, 19, 33],
    [251],
    [*SHARED, 7, 8],
    [*SHARED, 9],
    SHARED,
    SHARED,
    list(range(100, 165)),
]


def config(**changes) -> EngineConfig:
    values = {"context_tokens": 128, "num_blocks": 96, "block_tokens": BLOCK_TOKENS, "max_running": 8}
    return EngineConfig(**(values | {"max_step_tokens": 48, "max_waiting": 64, "min_prefill_chunk": 8} | changes))


async def run(engine: Engine, number: int, prompt: Sequence[int], **sampling) -> list[list[int]]:
    """Token ids of every choice."""
    params = SamplingParams(**({"max_tokens": 16, "temperature": 0.0, "ignore_eos": True} | sampling))
    request = Generate(
        request_id=f"r{number}",
        prompt=TokenPrompt(token_ids=tuple(prompt)),
        sampling=params,
        max_tokens=params.max_tokens,
        deadline_s=60.0,
    )
    choices: list[list[int]] = [[] for _ in range(params.n)]
    async for event in engine.submit(request):
        if isinstance(event, Delta):
            choices[event.index].extend(event.token_ids)
    return choices


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    directory = tmp_path_factory.mktemp("llama")
    reference = save_tiny_model(directory, "llama", eos_token_id=0)
    return directory, [greedy(reference, prompt, 16) for prompt in PROMPTS]


@pytest.mark.parametrize("borders", [[0, 4], [0, 1, 4], [0, 1, 3, 4]])
async def test_greedy_equals_generate_alone_and_in_company(model, borders: list[int]) -> None:
    directory, expected = model
    runners = load_runners(directory, borders, num_blocks=96)
    async with serve_stages(runners) as (link, _):
        engine = Engine(config(), tiny_text(), link)
        await engine.start()
        together = await asyncio.gather(*(run(engine, i, prompt) for i, prompt in enumerate(PROMPTS)))
        assert [choices[0] for choices in together] == expected
        hits_before = engine.stats().num_prefix_hits
        alone = [(await run(engine, i, prompt))[0] for i, prompt in enumerate(PROMPTS)]
        assert alone == expected
        assert engine.stats().num_prefix_hits > hits_before, "the second round was to use the prefix cache"
        engine.pool.check_integrity(())
        await engine.stop()


async def test_greedy_equals_generate_after_preemption(model) -> None:
    directory, expected = model
    runners = load_runners(directory, [0, 2, 4], num_blocks=32)
    async with serve_stages(runners) as (link, _):
        engine = Engine(config(num_blocks=32), tiny_text(), link)
        await engine.start()
        together = await asyncio.gather(*(run(engine, i, prompt) for i, prompt in enumerate(PROMPTS)))
        assert engine.stats().num_preemptions > 0, "the pool was to be too small"
        assert [choices[0] for choices in together] == expected
        await engine.stop()


@pytest.mark.parametrize("borders", [[0, 4], [0, 1, 3, 4]])
async def test_running_ahead_changes_no_token(model, borders: list[int]) -> None:
    directory, _ = model
    params = {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.7, "repetition_penalty": 1.2, "min_tokens": 3}
    seen = []
    for steps_ahead in (0, 1):
        async with serve_stages(load_runners(directory, borders, num_blocks=40)) as (link, _):
            engine = Engine(config(num_blocks=40, steps_ahead=steps_ahead), tiny_text(), link)
            await engine.start()
            runs = [
                run(engine, i, p, n=1 + i % 2, seed=i, ignore_eos=i % 2 == 0, **params) for i, p in enumerate(PROMPTS)
            ]
            seen.append(await asyncio.gather(*runs))
            assert engine.stats().num_preemptions > 0, "the pool was to be too small"
            await engine.stop()
    assert seen[0] == seen[1]


@pytest.mark.parametrize("borders", [[0, 4], [0, 2, 4]])
async def test_drafts_change_no_token(model, borders: list[int]) -> None:
    directory, _ = model
    runners = load_runners(directory, borders, num_blocks=192)
    seen = []
    for speculative_tokens in (0, 6):
        async with serve_stages(runners) as (link, _):
            engine = Engine(config(num_blocks=192, speculative_tokens=speculative_tokens), tiny_text(), link)
            await engine.start()
            runs = [
                run(engine, i, p, n=1 + i % 2, seed=i, max_tokens=40, temperature=0.3 * (i % 3), logprobs=1)
                for i, p in enumerate(PROMPTS)
            ]
            seen.append(await asyncio.gather(*runs))
            assert (engine.stats().num_accepted_tokens > 20) == bool(speculative_tokens)
            await engine.stop()
    assert seen[0] == seen[1]


async def test_seeded_sampling_does_not_depend_on_company(model) -> None:
    directory, _ = model
    params = {"temperature": 1.0, "seed": 42, "n": 3, "top_p": 0.9}
    async with serve_stages(load_runners(directory, [0, 3, 4], num_blocks=96)) as (link, _):
        engine = Engine(config(), tiny_text(), link)
        await engine.start()
        alone = await run(engine, 0, PROMPTS[1], **params)
        others = [run(engine, i, p, temperature=1.3, seed=i) for i, p in enumerate(PROMPTS, start=1)]
        company, *_ = await asyncio.gather(run(engine, 99, PROMPTS[1], **params), *others)
        assert company == alone
        assert len({tuple(choice) for choice in alone}) == 3, "the choices of one request differ"
        await engine.stop()
