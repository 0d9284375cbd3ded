"""Constrained sampling: whatever the model prefers, the text fits the grammar, and every sequence can end."""

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.messages import Grammar, SamplingParams, SequenceStart
from deployments.runtime.grammar import GrammarCompiler, GrammarError
from deployments.runtime.sample import Sampler
from tests.support.constrained import VOCABULARY, logits, run
from tests.support.json_schemas import schemas
from tests.support.tiny_tokenizer import EOS_ID, byte_level_tokenizer, tiny_text

TEXT = tiny_text()


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_level_tokenizer().backend_tokenizer.save(str(file))
    return GrammarCompiler(file)


def grammar(kind: str, text: str | dict[str, Any], **fields: Any) -> Grammar:
    content = text if isinstance(text, str) else json.dumps(text)
    return Grammar(kind=kind, text=content, end_token_ids=(EOS_ID,), **fields)


def start(
    constraint: Grammar | None, emitted: tuple[int, ...] = (), *, seed: int = 1, **params: Any
) -> SequenceStart:
    sampling = SamplingParams(**({"max_tokens": 400, "grammar": constraint} | params))
    return SequenceStart(1, (5, 6, *emitted), 2, sampling, seed, 0, () if sampling.ignore_eos else (EOS_ID,))


def text_of(tokens: list[int]) -> str:
    return TEXT.decode(tokens, skip_special_tokens=True)


@settings(max_examples=60, deadline=None)
@given(schema=schemas, seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 1.0, 2.0]))
def test_text_fits_any_schema(compiler: GrammarCompiler, schema: dict, seed: int, temperature: float) -> None:
    begin = start(grammar("json_schema", schema), temperature=temperature)
    tokens, ended = run(compiler, begin, seed=seed)
    assert ended
    jsonschema.validate(json.loads(text_of(tokens)), schema)


@settings(max_examples=15, deadline=None)
@given(schema=schemas, seed=st.integers(0, 99), cut=st.integers(0, 60))
def test_a_sequence_resumes_from_its_tokens(compiler: GrammarCompiler, schema: dict, seed: int, cut: int) -> None:
    constraint = grammar("json_schema", schema)
    tokens, _ = run(compiler, start(constraint), seed=seed)
    emitted = tuple(tokens[: min(cut, len(tokens) - 1)])
    assert run(compiler, start(constraint, emitted), seed=seed)[0] == tokens


@pytest.mark.parametrize(
    "pattern", ["[a-f]{3,8}", "(yes|no|maybe)", r"[0-9]{4}-[0-9]{2}-[0-9]{2}", "\u00e9+x", "a(b|c)*d{2}"]
)
def test_text_matches_the_whole_regular_expression(compiler: GrammarCompiler, pattern: str) -> None:
    for seed in range(5):
        tokens, ended = run(compiler, start(grammar("regex", pattern)), seed=seed)
        assert not ended or re.fullmatch(pattern, text_of(tokens))


def test_text_follows_a_context_free_grammar(compiler: GrammarCompiler) -> None:
    balanced = 'start: "(" start ")" | "x"'
    for seed in range(5):
        tokens, ended = run(compiler, start(grammar("lark", balanced)), seed=seed)
        text = text_of(tokens)
        assert ended
        assert text == "(" * text.count("(") + "x" + ")" * text.count("(")


def test_it_ends_with_the_token_after_which_nothing_may_come(compiler: GrammarCompiler) -> None:
    tokens, ended = run(compiler, start(grammar("regex", "abc")))
    assert (text_of(tokens), ended, EOS_ID in tokens) == ("abc", True, False)


def test_it_may_end_only_where_the_grammar_may(compiler: GrammarCompiler) -> None:
    wants_to_end = {EOS_ID: 100.0}
    tokens, _ = run(compiler, start(grammar("regex", "a{3,9}")), bias=wants_to_end)
    assert text_of(tokens) == "aaa"
    assert tokens[-1] == EOS_ID


def test_a_minimum_length_counts_as_far_as_the_grammar_goes(compiler: GrammarCompiler) -> None:
    wants_to_end = {EOS_ID: 100.0}
    pattern = grammar("regex", "a{3,9}")
    tokens, _ = run(compiler, start(pattern, min_tokens=5), bias=wants_to_end)
    assert text_of(tokens) == "aaaaa"
    tokens, ended = run(compiler, start(pattern, min_tokens=50), bias=wants_to_end)
    assert (text_of(tokens), ended) == ("a" * 9, True)


def test_ignoring_the_end_of_text_ends_with_the_grammar(compiler: GrammarCompiler) -> None:
    tokens, ended = run(compiler, start(grammar("regex", "a{3,9}"), ignore_eos=True), bias={EOS_ID: 100.0})
    assert (text_of(tokens), ended) == ("a" * 9, True)


def test_a_stop_token_that_alone_is_allowed_is_taken_however_early(compiler: GrammarCompiler) -> None:
    (letter,) = TEXT.encode_text("a", request_id="", context_tokens=9)
    tokens, ended = run(compiler, start(grammar("regex", "aa"), stop_token_ids=(letter,), min_tokens=2))
    assert (tokens, ended) == ([letter, letter], True)


def test_no_bias_lets_in_what_the_grammar_forbids(compiler: GrammarCompiler) -> None:
    biases = dict.fromkeys(range(100, 140), 100.0) | dict.fromkeys(range(2, 99), -100.0)
    tokens, ended = run(compiler, start(grammar("regex", "[0-9]{5}"), logit_bias=biases, repetition_penalty=1.5))
    assert ended
    assert re.fullmatch("[0-9]{5}", text_of(tokens))


def test_logprobs_are_of_the_models_own_distribution(compiler: GrammarCompiler) -> None:
    sampler = Sampler(compiler)
    sampler.start(start(grammar("regex", "a"), logprobs=2))
    row = logits(3, 0)
    sample = sampler.sample([1], row)[0]
    expected = torch.log_softmax(row[0], -1)
    assert sample.logprob == pytest.approx(float(expected[sample.token_id]), abs=1e-5)
    assert [token for token, _ in sample.top] == expected.topk(2).indices.tolist()


def test_company_is_not_constrained(compiler: GrammarCompiler) -> None:
    sampler = Sampler(compiler)
    sampler.start(start(grammar("regex", "a")))
    sampler.start(msgspec.structs.replace(start(None), sequence_id=2))
    rows = torch.cat([logits(1, 0), logits(1, 0)])
    alone = Sampler()
    alone.start(start(None))
    assert sampler.sample([1, 2], rows)[1].token_id == alone.sample([1], rows[:1])[0].token_id


def test_a_step_that_was_already_under_way_changes_nothing(compiler: GrammarCompiler) -> None:
    sampler = Sampler(compiler)
    sampler.start(start(grammar("regex", "ab")))
    samples = [sampler.sample([1], logits(0, position))[0] for position in range(4)]
    assert [sample.ended for sample in samples] == [False, True, True, True]
    assert all(sample.problem is None for sample in samples)


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (grammar("json_schema", {"not": {}}), r'Unimplemented keys: \["not"\]'),
        (grammar("json_schema", {"type": "strin"}), "Invalid type: strin"),
        (grammar("json_schema", {"type": "integer", "minimum": 2, "maximum": 1}), "Unsatisfiable schema"),
        (grammar("json_schema", {"$ref": "https://example.com/s.json"}), "does not fetch"),
        (
            grammar("json_schema", {"oneOf": [{"type": "number"}, {"type": "integer"}]}),
            r"not supported\. Write anyOf",
        ),
        (grammar("regex", "(a"), "regex"),
        (grammar("regex", "(?=a)b"), "look-around"),
        (grammar("lark", "start: ?"), "start"),
        (grammar("regex", "a" * 70_000), "at most 65536"),
        (Grammar(kind="regex", text="a"), "no token that ends a text"),
    ],
)
def test_what_cannot_be_enforced_is_refused(tmp_path: Path, constraint: Grammar, reason: str) -> None:
    file = tmp_path / "tokenizer.json"
    byte_level_tokenizer().backend_tokenizer.save(str(file))
    with pytest.raises(GrammarError, match=reason):
        GrammarCompiler(file).compile(constraint)


def test_a_lenient_schema_is_enforced_as_far_as_it_can_be(compiler: GrammarCompiler) -> None:
    items = {"oneOf": [{"type": "integer"}, {"type": "number", "maximum": 9}]}
    schema = {"type": "array", "items": items, "uniqueItems": True, "maxItems": 3}
    tokens, ended = run(compiler, start(grammar("json_schema", schema, lenient=True)))
    assert ended
    assert isinstance(json.loads(text_of(tokens)), list)


def test_a_grammar_that_costs_too_much_ends_its_sequence_alone(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.runtime.grammar.MASK_BURST_S", 0.02)
    monkeypatch.setattr("deployments.runtime.grammar.MASK_TOKEN_S", 0.0005)
    ambiguous = grammar("lark", 'start: "x" e\ne: e e | "a" | "b" | e "a" e')
    sampler = Sampler(compiler)
    sampler.start(start(ambiguous, ignore_eos=True))
    sampler.start(msgspec.structs.replace(start(grammar("regex", "[a-z]*"), ignore_eos=True), sequence_id=2))
    problems: list[str | None] = []
    for position in range(400):
        samples = sampler.sample([1, 2], torch.cat([logits(0, position)] * 2))
        assert samples[1].problem is None
        problems.append(samples[0].problem)
    first = next(position for position, problem in enumerate(problems) if problem is not None)
    assert "s of computing" in str(problems[first])
    assert problems[first:] == [problems[first]] * (400 - first)


def test_a_shared_automaton_that_is_full_is_begun_anew(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of one grammar share its lexer states; the limit on them must not depend on who came before."""
    monkeypatch.setattr("deployments.runtime.grammar.MAX_LEXER_STATES", 700)
    states = grammar("regex", r"(.*a.{7}b|.*c.{7}d)e")
    matcher = compiler.compile(states)
    num_states_alone = [take(compiler.compile(states, anew=True), seed) for seed in range(8)]
    assert num_states_alone == [None] * 8, "alone, each of these stays below the limit"
    shared = [take(matcher.deep_copy(), seed) for seed in range(8)]
    assert any(shared), "together they are above it"
    for seed in range(8):
        sampler = Sampler(compiler)
        sampler.start(start(states, ignore_eos=True))
        for token_id in letters(seed):
            row = torch.zeros((1, VOCABULARY))
            row[0, token_id] = 100.0
            sample = sampler.sample([1], row)[0]
            assert (sample.token_id, sample.problem) == (token_id, None)


def letters(seed: int) -> list[int]:
    """Forty random tokens from a to d."""
    text = "".join(random.Random(seed).choices("abcd", k=40))
    return TEXT.encode_text(text, request_id="", context_tokens=99)


def take(matcher: Any, seed: int) -> str | None:
    """What the library says when it follows ``letters``; None when it follows to the end."""
    for token_id in letters(seed):
        matcher.compute_bitmask()
        if not matcher.consume_token(token_id):
            return str(matcher.get_error())
    return None


def test_without_a_tokenizer_file_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match=r"no tokenizer\.json"):
        GrammarCompiler(tmp_path / "tokenizer.json").compile(grammar("regex", "a"))
