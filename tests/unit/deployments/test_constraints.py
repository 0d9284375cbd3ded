"""Constrained requests in an engine: a bad grammar hurts nobody else, a good one survives everything."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import pytest_asyncio

from deployments.messages import EmittedChoice, Grammar, RequestRefused
from deployments.replica.constraints import GrammarChecker
from deployments.replica.engine import Engine
from tests.support.engine_runs import TEXT, Outcome, collect, config, generate, link_for, running
from tests.support.local_stages import load_runners, serve_stages
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_tokenizer import EOS_ID, byte_level_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
WHITE_SPACE = {TEXT.encode_text(space, request_id="", context_tokens=9)[0]: -100.0 for space in " \n\t"}
TOO_DEEP = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(4000)) + '\nr4000: "a"'


def json_grammar(schema: dict[str, Any] | None = None, **fields: Any) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(schema or SCHEMA), **fields)


def lark(text: str) -> Grammar:
    return Grammar(kind="lark", text=text, param="structured_outputs", end_token_ids=(EOS_ID,))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with the byte-level tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    save_tiny_model(directory, "llama", vocab_size=TEXT.vocab_size + 3, eos_token_id=EOS_ID)
    byte_level_tokenizer().backend_tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def checker(directory: Path) -> AsyncIterator[GrammarChecker]:
    checker = GrammarChecker(directory / "tokenizer.json")
    yield checker
    await checker.stop()


async def test_a_grammar_that_kills_its_judge_is_refused_and_the_next_one_is_judged(checker: GrammarChecker) -> None:
    good, deep = lark('start: "a"'), lark(TOO_DEEP)
    for _ in range(2):  # the second time from memory
        with pytest.raises(RequestRefused, match="nested too deeply") as caught:
            await checker.check(deep, "r")
        assert (caught.value.refused.code, caught.value.refused.param) == ("invalid_request", "structured_outputs")
        await checker.check(good, "r")


async def test_a_check_that_its_client_gives_up_answers_no_other(checker: GrammarChecker) -> None:
    await checker.check(lark('start: "a"'), "r")
    abandoned = asyncio.create_task(checker.check(lark('start: "never"'), "r"))
    await asyncio.sleep(0)
    abandoned.cancel()
    with pytest.raises(RequestRefused, match="Unimplemented keys"):
        await checker.check(json_grammar({"not": {}}, end_token_ids=(EOS_ID,)), "r")
    await checker.check(lark('start: "b"'), "r")


async def test_without_a_checker_it_is_unsupported() -> None:
    settings = config()
    async with running(Engine(settings, TEXT, link_for(settings))) as engine:
        outcome = await collect(engine, generate(grammar=json_grammar()))
    assert outcome.refused is not None
    assert (outcome.refused.code, outcome.refused.param) == ("unsupported", "response_format")


async def answer(
    directory: Path, checker: GrammarChecker, *requests: Any, borders: Any = (0, 2, 4), num_blocks: int = 64
):
    """Outcomes of requests that run together on real stages of the tiny model."""
    settings = config(context_tokens=128, num_blocks=num_blocks, max_step_tokens=64)
    async with (
        serve_stages(load_runners(directory, borders, num_blocks=num_blocks)) as (link, _),
        running(Engine(settings, TEXT, link, grammars=checker)) as engine,
    ):
        outcomes = await asyncio.gather(*(collect(engine, request) for request in requests))
        return outcomes, engine.stats()


def structured(request_id: str = "r", prompt: Any = (5, 6, 7), **sampling: Any) -> Any:
    """A request for an object that fits SCHEMA, without white space, which a random model likes too much."""
    defaults = {"max_tokens": 100, "temperature": 0.9, "logit_bias": WHITE_SPACE, "grammar": json_grammar()}
    return generate(request_id, prompt, **(defaults | sampling))


def check_fits(outcome: Outcome, index: int = 0) -> None:
    assert outcome.refused is None, outcome.refused
    assert outcome.ends(index) == [("stop", None)]
    jsonschema.validate(json.loads(outcome.text(index)), SCHEMA)


async def test_every_choice_of_every_request_fits_its_schema(directory: Path, checker: GrammarChecker) -> None:
    requests = [structured(f"r{seed}", (5, 6, 7 + seed), seed=seed, n=2) for seed in range(2)]
    outcomes, _ = await answer(directory, checker, *requests)
    for outcome in outcomes:
        for index in range(2):
            check_fits(outcome, index)


async def test_preemption_and_another_pipeline_change_nothing(directory: Path, checker: GrammarChecker) -> None:
    requests = [structured(f"r{seed}", range(5 + seed, 33 + seed), seed=seed) for seed in range(3)]
    roomy, _ = await answer(directory, checker, *requests, borders=(0, 4))
    tight, stats = await answer(directory, checker, *requests, num_blocks=33)
    assert stats.num_preemptions > 0
    assert [outcome.text() for outcome in tight] == [outcome.text() for outcome in roomy]
    check_fits(tight[0])


async def test_another_replica_goes_on_where_this_one_was(directory: Path, checker: GrammarChecker) -> None:
    whole_request = structured(seed=4, n=2)
    (whole,), _ = await answer(directory, checker, whole_request)
    check_fits(whole)
    emitted = tuple(EmittedChoice(token_ids=tuple(whole.tokens(index)[: 1 + 8 * index])) for index in range(2))
    (rest,), _ = await answer(directory, checker, msgspec.structs.replace(whole_request, emitted=emitted))
    for index in range(2):
        assert [*emitted[index].token_ids, *rest.tokens(index)] == whole.tokens(index)
        assert rest.ends(index) == whole.ends(index)


async def test_the_limit_on_tokens_and_a_stop_string_cut_it_off(directory: Path, checker: GrammarChecker) -> None:
    limited, stopped = structured("limited", max_tokens=5), structured("stopped", stop=('"size"',))
    outcomes, _ = await answer(directory, checker, limited, stopped)
    assert [outcome.ends() for outcome in outcomes] == [[("length", None)], [("stop", '"size"')]]
    assert all(outcome.text().startswith('{"name":') for outcome in outcomes[1:])


async def test_minimum_and_ignored_end_do_not_outlive_the_grammar(directory: Path, checker: GrammarChecker) -> None:
    short = Grammar(kind="regex", text="abc")
    request = generate(max_tokens=50, min_tokens=40, ignore_eos=True, grammar=short)
    (outcome,), _ = await answer(directory, checker, request)
    assert (outcome.text(), outcome.ends()) == ("abc", [("stop", None)])


async def test_an_impossible_grammar_is_refused_beside_one_that_is_served(
    directory: Path, checker: GrammarChecker
) -> None:
    bad = structured("bad", grammar=json_grammar({"type": "strin"}))
    outcomes, _ = await answer(directory, checker, structured("good"), bad)
    check_fits(outcomes[0])
    refused = outcomes[1].refused
    assert refused is not None
    assert (refused.code, refused.param) == ("invalid_request", "response_format")
    assert "Invalid type: strin" in refused.message


async def test_a_grammar_that_becomes_too_costly_ends_its_request_alone(
    directory: Path, checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.runtime.grammar.MASK_BURST_S", 0.005)
    monkeypatch.setattr("deployments.runtime.grammar.MASK_TOKEN_S", 0.0)
    ambiguous = lark('start: "x" e\ne: e e | "a" | "b" | e "a" e')
    costly = generate("costly", max_tokens=100, n=2, temperature=1.0, grammar=ambiguous)
    outcomes, _ = await answer(directory, checker, costly, generate("plain", max_tokens=60))
    assert outcomes[1].refused is None
    refused = outcomes[0].refused
    assert refused is not None
    assert (refused.code, refused.param) == ("invalid_request", "structured_outputs")
    assert "s of computing" in refused.message
