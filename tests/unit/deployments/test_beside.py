"""Adapters beside their base: each request gets the tokens of the merged model, whatever its company's adapters."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from deployments.messages import Delta, Generate, RequestRefused, SamplingParams, Started, TokenPrompt
from deployments.replica.engine import Engine, EngineConfig
from deployments.runtime.support import UnsupportedModelError
from tests.support.local_stages import load_runners, serve_stages
from tests.support.tiny_adapter import merge_by_hand, write_adapter
from tests.support.tiny_models import greedy, save_tiny_model
from tests.support.tiny_tokenizer import tiny_text

SHARED = list(range(20, 60))
PROMPTS = [[5, 9, 200, 31], [*SHARED, 7, 8], SHARED, [251]]
NUM_TOKENS = 12
Expected = dict[str | None, list[list[int]]]
CONFIG = {"context_tokens": 128, "num_blocks": 128, "block_tokens": 4, "max_running": 12, "max_step_tokens": 48}


async def run(engine: Engine, prompt: Sequence[int], adapter: str | None) -> tuple[Started, list[int]]:
    request = Generate(
        request_id=f"{adapter}-{hash(tuple(prompt))}",
        prompt=TokenPrompt(token_ids=tuple(prompt)),
        sampling=SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True),
        max_tokens=NUM_TOKENS,
        deadline_s=60.0,
        adapter=adapter,
    )
    events = [event async for event in engine.submit(request)]
    assert isinstance(events[0], Started)
    return events[0], [token for event in events if isinstance(event, Delta) for token in event.token_ids]


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Path], dict[str | None, list[list[int]]]]:
    """The base, two adapters of it, and what the base and the merged models continue each prompt with."""
    root = tmp_path_factory.mktemp("beside")
    base = save_tiny_model(root / "base", "llama", eos_token_id=0)
    expected: Expected = {None: [greedy(base, prompt, NUM_TOKENS) for prompt in PROMPTS]}
    adapters = {}
    for seed, (name, targets) in enumerate(
        {"wide": ("q_proj", "o_proj", "gate_proj"), "deep": ("down_proj",)}.items()
    ):
        adapters[name] = write_adapter(root / name, root / "base", seed=seed, targets=targets, rank=2 + seed)
        merged = merge_by_hand(root / f"{name}-merged", root / "base", adapters[name])
        model = AutoModelForCausalLM.from_pretrained(merged).eval()
        expected[name] = [greedy(model, prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert len({str(tokens) for tokens in expected.values()}) == 3, "the adapters were to change something"
    return root / "base", adapters, expected


@pytest.mark.parametrize("borders", [[0, 4], [0, 1, 4]])
async def test_mixed_batches_give_the_tokens_of_the_merged_models(served, borders: list[int]) -> None:
    base, adapters, expected = served
    runners = load_runners(base, borders, num_blocks=128, adapters=adapters)
    async with serve_stages(runners) as (link, _):
        texts = {name: tiny_text() for name in adapters}
        engine = Engine(EngineConfig(**CONFIG, max_waiting=64), tiny_text(), link, adapters=texts)
        await engine.start()
        asked = [(prompt, name) for prompt in PROMPTS for name in expected]
        for _ in ("cold", "from the prefix cache"):
            answers = await asyncio.gather(*(run(engine, prompt, name) for prompt, name in asked))
            for (prompt, name), (_, tokens) in zip(asked, answers, strict=True):
                assert tokens == expected[name][PROMPTS.index(prompt)], name
        assert engine.stats().num_prefix_hits > 0
        engine.pool.check_integrity(())
        await engine.stop()


async def test_keys_and_values_are_never_shared_between_adapters(served) -> None:
    base, adapters, expected = served
    async with serve_stages(load_runners(base, [0, 4], num_blocks=128, adapters=adapters)) as (link, _):
        texts = {name: tiny_text() for name in adapters}
        engine = Engine(EngineConfig(**CONFIG, max_waiting=64), tiny_text(), link, adapters=texts)
        await engine.start()
        for cached in (0, 36):  # of 40 tokens in blocks of 4, all but the last block
            for name in expected:
                started, tokens = await run(engine, SHARED, name)
                assert (started.num_cached_tokens, tokens) == (cached, expected[name][PROMPTS.index(SHARED)])
        with pytest.raises(RequestRefused) as caught:
            await run(engine, SHARED, "gone")
        assert (caught.value.refused.code, caught.value.refused.param) == ("model_not_found", "model")
        await engine.stop()


def test_native_kernels_leave_them_to_torch(served) -> None:
    base, adapters, _ = served
    (runner,) = load_runners(base, [0, 4], dtype="bfloat16", adapters=adapters)
    assert runner.kernels == "torch"


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("llama", {"dora": True}, "only LoRA can be served beside its base"),
        ("mixtral", {"targets": ("q_proj",)}, "does not see every row of a step"),
    ],
)
def test_what_cannot_be_added_is_refused(model_type: str, changes: dict, words: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", model_type)
    adapter = write_adapter(tmp_path / "tuned", tmp_path / "base", **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        load_runners(tmp_path / "base", [0, 4], adapters={"tuned": adapter})


async def test_a_stage_that_does_not_know_the_adapter_says_so(served) -> None:
    base, _, _ = served
    async with serve_stages(load_runners(base, [0, 4], num_blocks=128)) as (link, _):
        engine = Engine(EngineConfig(**CONFIG, max_waiting=64), tiny_text(), link, adapters={"wide": tiny_text()})
        await engine.start()
        with pytest.raises(RequestRefused, match="no adapter 'wide' here"):
            await run(engine, PROMPTS[0], "wide")
        await engine.stop()
