"""Taking calls out of text: whatever the text, and however it is cut, nothing is lost and nothing told twice."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.gateway.call_parser import Arguments, CallBegins, CallParser, Content, Piece
from deployments.messages import ToolFormat

NAMES = frozenset({"get", "put"})


def parse(tool_format: ToolFormat, *pieces: str) -> tuple[str, list[tuple[str, str]]]:
    """Content, and name and arguments of every call."""
    parser = CallParser(tool_format, NAMES)
    told: list[Piece] = list(itertools.chain.from_iterable(parser.feed(piece) for piece in pieces))
    told += parser.finish()
    content, names, arguments = "", list[str](), list[str]()
    for piece in told:
        match piece:
            case Content():
                content += piece.text
            case CallBegins():
                assert piece.index == len(names)
                names.append(piece.name)
                arguments.append("")
            case Arguments():
                assert piece.index == len(names) - 1
                arguments[-1] += piece.text
    assert parser.num_calls == len(names)
    return content, list(zip(names, arguments, strict=True))


@pytest.mark.parametrize(
    ("tool_format", "text", "content", "calls"),
    [
        ("hermes", "hello", "hello", []),
        ("hermes", "  ", "  ", []),
        (
            "hermes",
            'Hi.\n<tool_call>\n{"name": "get", "arguments": {"a": "x}\\"y"}}\n</tool_call>',
            "Hi.",
            [("get", '{"a": "x}\\"y"}')],
        ),
        (
            "hermes",
            '<tool_call>{"arguments": {"a":1}, "name": "get"}</tool_call>\n'
            '<tool_call>\n{"name": "put"}\n</tool_call>\nDone. ',
            "Done. ",
            [("get", '{"a":1}'), ("put", "{}")],
        ),
        ("hermes", "a < b <tool", "a < b <tool", []),
        ("hermes", "<tool_call> none </tool_call> x", "<tool_call> none </tool_call> x", []),
        ("hermes", '<tool_call>no <tool_call>{"name": "get"}</tool_call>', "<tool_call>no", [("get", "{}")]),
        ("hermes", '<tool_call><tool_call>{"name": "get"}</tool_call>', "<tool_call>", [("get", "{}")]),
        ("hermes", '<tool_call>{"name": "get", "arguments": {"a": ', "", [("get", '{"a": ')]),
        ("hermes", '<tool_call>{"na', '<tool_call>{"na', []),
        ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        (
            "hermes",
            '<tool_call>{"name": "get", "arguments": "{\\"a\\": 1}"}</tool_call>',
            "",
            [("get", '{"a": 1}')],
        ),
        ("hermes", '<tool_call>{"name": "get", "arguments": {}}</tool_c', "", [("get", "{}")]),
        (
            "hermes",
            '<tool_call>{"name": "get", "arguments": {"a": 1},, }</tool_call> t',
            "t",
            [("get", '{"a": 1}, }')],
        ),
        ("llama3_json", "hello", "hello", []),
        ("llama3_json", '{"name": "get", "parameters": {"a": 1}}', "", [("get", '{"a": 1}')]),
        (
            "llama3_json",
            '  <|python_tag|>{"name": "get", "parameters": {"a": 1}}; {"name": "put", "parameters": {}}\n',
            "",
            [("get", '{"a": 1}'), ("put", "{}")],
        ),
        ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ("llama3_json", "<b>x", "<b>x", []),
        ("llama3_json", '{"name": "get", "parameters": {}} and more', "and more", [("get", "{}")]),
        ("mistral", "hello [x]", "hello [x]", []),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "get", "arguments": {"a": 1}}, {"name": "put", "arguments": {}}]',
            "",
            [("get", '{"a": 1}'), ("put", "{}")],
        ),
        (
            "mistral",
            'x [TOOL_CALLS]get[ARGS]{"a": 1}[TOOL_CALLS]put[CALL_ID]123456789[ARGS]{}',
            "x",
            [("get", '{"a": 1}'), ("put", "{}")],
        ),
        ("mistral", "[TOOL_CALLS]what is this", "[TOOL_CALLS]what is this", []),
        ("mistral", '[TOOL_CALLS] [{"name": "get"},', "", [("get", "{}")]),
        ("mistral", '[TOOL_CALLS] [{"name": "get"}] and', "and", [("get", "{}")]),
    ],
)
def test_calls_and_content(tool_format: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parse(tool_format, text) == (content, calls)
    assert parse(tool_format, *text) == (content, calls)


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<tool", "[", "]", ";", ",", "{", "}",
    '{"name": "get", "arguments": {"a": "\\" }"}}', '{"name": "put", "parameters": {}}', '{"name": ', '"get"', "get",
    " ", "\n", "words ", '"', "\\", ":", "1", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@settings(deadline=None, max_examples=400)
@given(tool_format=st.sampled_from(["hermes", "llama3_json", "mistral"]), text=texts, data=st.data())
def test_the_cut_does_not_matter(tool_format: ToolFormat, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)])]
    content, calls = parse(tool_format, text)
    assert parse(tool_format, *pieces) == (content, calls)
    if not calls:
        assert content == text or (tool_format == "mistral" and "[]" in "".join(text.split()))


@settings(deadline=None, max_examples=200)
@given(text=texts)
def test_streams_tell_no_less_than_is_certain(text: str) -> None:
    """Plain text leaves as it comes, but for white space and what may begin a marker."""
    parser = CallParser("hermes", NAMES)
    told = "".join(piece.text for piece in parser.feed("plain words" + text) if isinstance(piece, Content))
    assert told.startswith("plain words")
