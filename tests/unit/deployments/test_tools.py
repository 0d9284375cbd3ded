"""Tools in a replica: what the template shows, how calls are written, and that enforced calls are calls."""

import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from deployments.gateway.call_parser import Arguments, CallBegins, CallParser, Content
from deployments.messages import ChatPrompt, Generate, Grammar, RequestRefused, SamplingParams, SequenceStart, ToolUse
from deployments.replica.admission import admit_tools
from deployments.replica.engine import Engine
from deployments.replica.text import TextTokenizer
from deployments.replica.tools import CallSyntax, find_tool_format, tool_grammar
from deployments.runtime.grammar import GrammarCompiler
from tests.support.constrained import run
from tests.support.engine_runs import collect, config, link_for, running
from tests.support.tiny_tokenizer import CHAT_TEMPLATE, EOS_ID, HERMES_TEMPLATE, byte_level_tokenizer

SCHEMAS: dict[str, dict[str, Any]] = {
    "get": {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/small"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
        "$defs": {"small": {"type": "integer", "minimum": 0, "maximum": 99}},
    },
    "put": {
        "type": "object",
        "properties": {"c": {"type": "boolean"}},
        "required": ["c"],
        "additionalProperties": False,
    },
}
TOOLS = tuple(
    json.dumps({"type": "function", "function": {"name": name, "parameters": schema}})
    for name, schema in SCHEMAS.items()
)
HELLO = ({"role": "user", "content": "hello"},)
MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]")
WAYS = [
    *itertools.product(["hermes", "mistral", "llama3_json"], [False]),
    ("mistral", True),  # the function's name comes before [ARGS]
]


def text_tokenizer(template: str | None, **options: Any) -> TextTokenizer:
    return TextTokenizer(byte_level_tokenizer(chat_template=template, **options), (EOS_ID,))


def rendered(template: str, prompt: ChatPrompt) -> str:
    tokenizer = text_tokenizer(template)
    token_ids = tokenizer.encode(prompt, request_id="r", context_tokens=4096)
    return tokenizer.decode(token_ids, skip_special_tokens=False)


def test_the_template_shows_tools_and_calls_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get", "arguments": '{"a": "é"}'}}
    messages = (*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "5"})
    text = rendered(HERMES_TEMPLATE, ChatPrompt(messages=messages, tools=TOOLS))
    assert "Tools:" in text
    assert '"name": "put"' in text
    assert '<tool_call>get{"a": "é"}</tool_call>' in text
    assert "Tools:" not in rendered(HERMES_TEMPLATE, ChatPrompt(messages=messages))


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (ChatPrompt(messages=HELLO, tools=TOOLS), "tools"),
        (ChatPrompt(messages=(*HELLO, {"role": "tool", "content": "5", "tool_call_id": "1"})), "messages"),
    ],
)
def test_a_template_that_knows_no_tools_is_unsupported(prompt: ChatPrompt, param: str) -> None:
    with pytest.raises(RequestRefused, match="knows no tools") as caught:
        rendered(CHAT_TEMPLATE, prompt)
    assert (caught.value.refused.code, caught.value.refused.param) == ("unsupported", param)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (HERMES_TEMPLATE, "hermes"),
        ("{{ '[AVAILABLE_TOOLS]' }}{{ '[TOOL_CALLS]' }}", "mistral"),
        ("""{{ '{"name": function name, "parameters": dictionary}' }}{{ 'ipython' }}""", "llama3_json"),
        (CHAT_TEMPLATE, None),
    ],
)
def test_the_template_tells_how_calls_are_written(template: str, expected: str | None) -> None:
    assert find_tool_format(template) == expected


def request(**fields: Any) -> Generate:
    defaults: dict[str, Any] = {
        "request_id": "r",
        "prompt": ChatPrompt(messages=HELLO, tools=TOOLS),
        "sampling": SamplingParams(max_tokens=400),
        "max_tokens": 400,
        "deadline_s": 9.0,
        "tools": ToolUse(required=True),
    }
    return Generate(**(defaults | fields))


def test_a_way_of_calling_that_cannot_be_told_is_unsupported() -> None:
    strange = HERMES_TEMPLATE.replace("tool_call>", "call>")
    with pytest.raises(RequestRefused, match="tool_parser") as caught:
        admit_tools(request(), text_tokenizer(strange))
    assert caught.value.refused.param == "tools"
    told = TextTokenizer(byte_level_tokenizer(chat_template=strange), (EOS_ID,), tool_format="llama3_json")
    assert admit_tools(request(), told).sampling.grammar is not None


@pytest.mark.parametrize("special", [False, True])
def test_markers_that_are_special_tokens_stay_in_the_text(special: bool) -> None:
    tokenizer = text_tokenizer(HERMES_TEMPLATE, added=MARKERS, special=special)
    assert admit_tools(request(), tokenizer).sampling.skip_special_tokens is not special


def test_free_calls_need_no_grammar() -> None:
    tokenizer = text_tokenizer(HERMES_TEMPLATE)
    assert admit_tools(request(tools=ToolUse()), tokenizer).sampling.grammar is None
    assert admit_tools(request(tools=ToolUse(parallel=False)), tokenizer).sampling.grammar is not None
    assert admit_tools(request(tools=ToolUse(strict=("get",))), tokenizer).sampling.grammar is not None


async def test_the_client_learns_how_calls_are_written() -> None:
    settings = config(context_tokens=1024, num_blocks=256)
    tokenizer = text_tokenizer(HERMES_TEMPLATE)
    async with running(Engine(settings, tokenizer, link_for(settings))) as engine:
        few = {"max_tokens": 3, "sampling": SamplingParams(max_tokens=3, seed=1)}
        outcome = await collect(engine, request(tools=ToolUse(), **few))
        plain = await collect(engine, request(tools=None, **few))
    assert outcome.started is not None
    assert outcome.started.tool_format == "hermes"
    assert plain.started is not None
    assert plain.started.tool_format is None


@pytest.fixture(scope="module", params=[False, True], ids=["plain text", "tokens"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A tokenizer with or without tokens for the markers, and its compiler."""
    tokenizer = byte_level_tokenizer(added=MARKERS if request.param else (), special=True)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(file))
    return TextTokenizer(tokenizer, (EOS_ID,)), GrammarCompiler(Path(file))


def constraint(world: tuple[Any, ...], way: tuple[Any, bool], use: ToolUse, answer: Grammar | None = None) -> Grammar:
    syntax = CallSyntax(format=way[0], marker=world[0].template._added_ids.get, names_function_first=way[1])
    grammar = tool_grammar(syntax, ChatPrompt(messages=HELLO, tools=TOOLS), use, answer)
    assert grammar is not None
    return msgspec.structs.replace(grammar, end_token_ids=(EOS_ID,))


def say(world: tuple[Any, ...], way: tuple[Any, bool], use: ToolUse, seed: int, answer: Grammar | None = None) -> str:
    """What a senseless model says under the grammar of ``use``; it must come to an end."""
    tokenizer, compiler = world
    sampling = SamplingParams(max_tokens=400, grammar=constraint(world, way, use, answer), temperature=0.8)
    tokens, ended = run(compiler, SequenceStart(1, (5, 6), 2, sampling, seed, 0, (EOS_ID,)), seed=seed)
    assert ended
    return str(tokenizer.decode([token for token in tokens if token != EOS_ID], skip_special_tokens=False))


def calls_in(text: str, way: tuple[Any, bool]) -> tuple[str, list[tuple[str, str]]]:
    parser = CallParser(way[0], frozenset(SCHEMAS))
    content, calls = "", list[tuple[str, str]]()
    for piece in [*parser.feed(text), *parser.finish()]:
        match piece:
            case Content():
                content += piece.text
            case CallBegins():
                calls.append((piece.name, ""))
            case Arguments():
                calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return content, calls


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_required_call_is_a_call_that_fits(world: tuple[Any, ...], way: tuple[Any, bool]) -> None:
    for seed in range(4):
        content, calls = calls_in(say(world, way, ToolUse(required=True, parallel=False), seed), way)
        ((name, arguments),) = calls
        assert content == ""
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_named_call_is_of_that_function(world: tuple[Any, ...], way: tuple[Any, bool]) -> None:
    use = ToolUse(required=True, name="put", parallel=False, strict=("put",))
    _, calls = calls_in(say(world, way, use, 1), way)
    assert [name for name, _ in calls] == ["put"]


TWO_CALLS = {
    ("hermes", False): '<tool_call>\n{"name": "get", "arguments": {"a": 1, "b": "x"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "put", "arguments": {"c":true}}\n</tool_call>',
    ("mistral", False): '[TOOL_CALLS] [{"name": "get", "arguments": {"a": 1, "b": "x"}}, '
    '{"name": "put", "arguments": {"c":true}}]',
    ("mistral", True): '[TOOL_CALLS]get[ARGS]{"a": 1, "b": "x"}[TOOL_CALLS]put[ARGS]{"c":true}',
}


@pytest.mark.parametrize("way", TWO_CALLS, ids=str)
def test_several_calls_are_allowed_only_in_parallel(world: tuple[Any, ...], way: tuple[Any, bool]) -> None:
    tokenizer, compiler = world
    tokens = tokenizer.encode_text(TWO_CALLS[way], request_id="", context_tokens=999)

    def takes(use: ToolUse, tokens: list[int]) -> bool:
        matcher = compiler.compile_alone(constraint(world, way, use))
        return bool(matcher.consume_tokens(tokens) and matcher.is_accepting())

    assert takes(ToolUse(required=True), tokens)
    assert takes(ToolUse(strict=("get",)), tokens)
    assert not takes(ToolUse(required=True, parallel=False), tokens)
    assert not takes(ToolUse(parallel=False), tokens)
    content, calls = calls_in(TWO_CALLS[way], way)
    assert (content, calls) == ("", [("get", '{"a": 1, "b": "x"}'), ("put", '{"c":true}')])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_call_or_a_formed_answer(world: tuple[Any, ...], way: tuple[Any, bool]) -> None:
    answer = Grammar(kind="json_schema", text='{"enum": [[1], [2]]}')
    said = [say(world, way, ToolUse(parallel=False), seed, answer) for seed in range(8)]
    parsed = [calls_in(text, way) for text in said]
    assert all(calls or json.loads(content) in ([1], [2]) for content, calls in parsed)
    assert any(calls for _, calls in parsed) != all(calls for _, calls in parsed)


def test_a_strict_call_amid_free_text_fits(world: tuple[Any, ...]) -> None:
    tokenizer, compiler = world
    use = ToolUse(parallel=False, strict=("get", "put"))
    words = tokenizer.encode_text("Well:<tool_call>", request_id="", context_tokens=99)
    sampling = SamplingParams(max_tokens=400, grammar=constraint(world, ("hermes", False), use))
    begin = SequenceStart(1, (5, 6, *words), 2, sampling, 3, 0, (EOS_ID,))
    tokens, ended = run(compiler, begin, seed=3)
    assert ended
    content, ((name, arguments),) = calls_in(tokenizer.decode(tokens, skip_special_tokens=False), ("hermes", False))
    assert content == "Well:"
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])
