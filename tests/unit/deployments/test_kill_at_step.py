"""Stage k dies at step s, for every k and s: real tiny stages, mixed requests, and the text of an undisturbed run."""

import asyncio
from itertools import product

import pytest

from deployments.replica.engine import Engine
from tests.support.dying_stage import DyingRunner
from tests.support.local_stages import LocalStages, load_runners, serve_stages
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_tokenizer import tiny_text
from tests.unit.deployments.test_engine_exact import PROMPTS, config, run
from tests.unit.deployments.test_stage_loss import supervised

MIXED: list[tuple[list[int], dict]] = [
    (PROMPTS[0], {}),
    (PROMPTS[1], {"temperature": 1.0, "seed": 7}),
    (PROMPTS[3], {"temperature": 0.9, "seed": 8, "n": 3, "top_p": 0.9}),
    (PROMPTS[4], {"logprobs": 2, "frequency_penalty": 0.6, "max_tokens": 9}),
    (PROMPTS[7], {"temperature": 1.2, "seed": 9, "repetition_penalty": 1.3, "min_p": 0.05}),
]


async def say_all(engine: Engine) -> list[list[list[int]]]:
    asked = (run(engine, number, prompt, **params) for number, (prompt, params) in enumerate(MIXED))
    return await asyncio.gather(*asked)


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("llama")
    save_tiny_model(directory, "llama", eos_token_id=0)
    return load_runners(directory, [0, 2, 4], num_blocks=96)


@pytest.fixture(scope="module")
def undisturbed(runners) -> list[list[list[int]]]:
    async def say() -> list[list[list[int]]]:
        async with serve_stages(runners) as (link, _):
            engine = Engine(config(), tiny_text(), link)
            await engine.start()
            said = await say_all(engine)
            await engine.stop()
            return said

    said = asyncio.run(say())
    assert [len(choices) for choices in said] == [1, 1, 3, 1, 1]
    return said


@pytest.mark.parametrize(
    ("steps_ahead", "stage", "step"),
    [*product((0,), (0, 1), (0, 1, 2, 3, 5, 8, 13, 21)), *product((1,), (0, 1), (0, 2, 5, 13))],
)
async def test_a_stage_that_dies_at_any_step_costs_no_token(
    runners, undisturbed, steps_ahead: int, stage: int, step: int
) -> None:
    dying = [DyingRunner(runner, [step] if index == stage else []) for index, runner in enumerate(runners)]
    for runner in dying:
        runner.forget()
    async with supervised(LocalStages(dying), steps_ahead=steps_ahead) as engine:
        assert await say_all(engine) == undisturbed
        assert [runner.num_deaths for runner in dying] == [int(index == stage) for index in (0, 1)]
        assert engine.stats().num_recoveries == 1
        assert engine.stats().num_blocks_used == 0


async def test_stages_that_die_again_while_they_recompute_cost_no_token(runners, undisturbed) -> None:
    dying = [DyingRunner(runners[0], [4, 12]), DyingRunner(runners[1], [7, 8])]
    for runner in dying:
        runner.forget()
    async with supervised(LocalStages(dying)) as engine:
        assert await say_all(engine) == undisturbed
        assert [runner.num_deaths for runner in dying] == [2, 2]
        assert engine.stats().num_blocks_used == 0
