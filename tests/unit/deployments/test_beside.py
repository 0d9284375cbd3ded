"""Adapters beside their base: each request gets the tokens of the merged model, whatever its company's adapters."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from msgspec import structs
from transformers import AutoModelForCausalLM

from deployments.messages import (
    Delta,
    Generate,
    RequestRefused,
    SamplingParams,
    SequenceStep,
    Started,
    StepInput,
    TokenPrompt,
)
from deployments.replica.engine import Engine, EngineConfig
from deployments.runtime.support import UnsupportedModelError
from tests.support.local_stages import load_runners, serve_stages
from tests.support.native_slices import load_native, needs_native, random_tokens, run_through
from tests.support.tiny_adapter import merge_by_hand, write_adapter
from tests.support.tiny_models import greedy, save_tiny_model
from tests.support.tiny_tokenizer import tiny_text

SHARED = list(range(20, 60))
PROMPTS = [[5, 9, 200, 31], [*SHARED, 7, 8], SHARED, [251]]
NUM_TOKENS = 12
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NATIVE = {"hidden_size": 96, "intermediate_size": 112, "head_dim": 32, "num_hidden_layers": 2}
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


@needs_native
@pytest.mark.parametrize(("quantization", "error"), [(None, 0.12), ("int8", 0.05), ("int4", 0.1)])
@pytest.mark.parametrize("borders", [[0, 2], [0, 1, 2]])
def test_native_kernels_add_to_the_rows_of_each_adapter(
    borders: list[int], quantization: str | None, error: float, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "base", "llama", **NATIVE)
    adapters = {
        name: write_adapter(tmp_path / name, tmp_path / "base", seed=seed, targets=targets, rank=3 + seed)
        for seed, (name, targets) in enumerate({"all": ALL, "some": ("v_proj", "up_proj")}.items())
    }
    slices = load_native(tmp_path / "base", borders, quantization=quantization, adapters=adapters)
    (reference,) = load_runners(
        tmp_path / "base", [0, 2], block_tokens=16, quantization=quantization, adapters=adapters
    )
    prompts = {None: random_tokens(21), "all": random_tokens(43, seed=1), "some": random_tokens(1, seed=2)}
    steps = [
        SequenceStep(index, tuple(tokens), 0, (3 * index, 3 * index + 1, 3 * index + 2), True, None, name)
        for index, (name, tokens) in enumerate(prompts.items())
    ]
    together = run_through(slices, steps)
    expected = reference.compute(StepInput(step=0, sequences=tuple(steps)), None)
    without = run_through(slices, [structs.replace(step, adapter=None) for step in steps])
    for index, step in enumerate(steps):
        assert torch.equal(run_through(slices, [step])[0], together[index]), "company changes no bit"
        assert (together[index] - expected[index]).norm() < error * expected[index].norm()
        assert step.adapter is None or (without[index] - expected[index]).norm() > 0.3 * expected[index].norm()
    assert torch.equal(without[0], together[0])


@needs_native
def test_native_kernels_refuse_what_does_not_fit(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "llama", **NATIVE)
    save_tiny_model(tmp_path / "wider", "llama", **NATIVE | {"intermediate_size": 96})
    (native,) = load_native(tmp_path / "base", [0, 2])
    with pytest.raises(ValueError, match="no adapter 'gone' here"):
        native.compute([SequenceStep(0, (5,), 0, (0,), True, None, "gone")], None, every_row=False)
    wider = write_adapter(tmp_path / "a", tmp_path / "wider", targets=ALL)
    with pytest.raises(UnsupportedModelError, match="in the base, but the adapter is for"):
        load_native(tmp_path / "base", [0, 2], adapters={"tuned": wider})
    dora = write_adapter(tmp_path / "b", tmp_path / "base", dora=True)
    with pytest.raises(UnsupportedModelError, match="only LoRA"):
        load_native(tmp_path / "base", [0, 2], adapters={"tuned": dora})


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
