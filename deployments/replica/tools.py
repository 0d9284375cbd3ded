"""Tools of a conversation: how the model's chat template shows them, how it writes calls, and the grammar of calls.

The way a model writes calls is read off its template. Calls are enforced with a grammar where the request says that
there must be one (``tool_choice``), at most one (``parallel_tool_calls``), or that arguments fit (``strict``).
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from deployments.messages import ChatPrompt, Grammar, ToolFormat, ToolUse
from deployments.runtime.grammar import schema_options

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError)
"""What rendering a chat template may raise: the template is part of the model, and so is what it does not expect."""

Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]

_PROBE = {"type": "function", "function": {"name": "probe", "description": "probe", "parameters": {"type": "object"}}}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_TEXT = r"TEXT: /(.|\n)*/"


def template_messages(prompt: ChatPrompt) -> list[dict[str, Any]]:
    """The conversation as templates expect it: arguments of past calls are objects."""
    return [_with_decoded_arguments(message) for message in prompt.messages]


def _with_decoded_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        calls.append({**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}})
    return {**message, "tool_calls": calls}


def speaks_of_tools(prompt: ChatPrompt) -> bool:
    """Whether a template that knows no tools would leave out something."""
    return bool(prompt.tools) or any(
        message["role"] == "tool" or message.get("tool_calls") for message in prompt.messages
    )


def template_knows_tools(render: Render) -> bool:
    """Whether tools change what ``render`` writes."""
    conversation = [{"role": "user", "content": "hello"}]
    try:
        return render(conversation, [_PROBE]) != render(conversation, None)
    except TEMPLATE_ERRORS:
        return False


def find_tool_format(template: str) -> ToolFormat | None:
    """How the model of ``template`` writes calls; None where the template does not tell."""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        return "hermes"
    if '"parameters"' in template and ("ipython" in template or "<|python_tag|>" in template):
        return "llama3_json"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """How one model writes calls.

    ``marker`` gives the id of an added token, which a grammar has to name by its id; None for plain text.
    ``names_function_first`` is Mistral's newer ``[TOOL_CALLS]name[ARGS]{...}``.
    """

    format: ToolFormat
    marker: Callable[[str], int | None]
    names_function_first: bool = False

    def markers(self) -> tuple[str, ...]:
        """Texts around calls that must reach the parser, even where they are special tokens."""
        match self.format:
            case "hermes":
                return ("<tool_call>", "</tool_call>")
            case "mistral":
                return ("[TOOL_CALLS]", "[ARGS]") if self.names_function_first else ("[TOOL_CALLS]",)
        return ()


def tool_grammar(syntax: CallSyntax, prompt: ChatPrompt, use: ToolUse, answer: Grammar | None) -> Grammar | None:
    """What holds for the whole output: calls, ``answer``, or free text, as ``use`` allows; None: anything goes."""
    if not use.required and use.parallel and not use.strict and answer is None:
        return None
    functions = [json.loads(tool)["function"] for tool in prompt.tools]
    named = [function for function in functions if use.name in (None, function["name"])]
    writer = _LarkWriter(syntax, use)
    return Grammar(
        kind="lark",
        text="\n".join((*writer.start(answer), *writer.functions(named))),
        param="tools" if answer is None else answer.param,
    )


class _LarkWriter:
    """Writes the rules of one request."""

    def __init__(self, syntax: CallSyntax, use: ToolUse) -> None:
        self._syntax = syntax
        self._use = use

    def start(self, answer: Grammar | None) -> Iterable[str]:
        """The rule of the whole output."""
        may_repeat = self._use.parallel and self._syntax.format != "llama3_json"
        if self._use.required:
            yield f"start: {self._calls(may_repeat)}"
        elif answer is not None:
            yield f"start: {self._calls(may_repeat)} | answer"
            yield f"answer: %json {_with_options(json.loads(answer.text), lenient=answer.lenient)}"
        else:
            yield from self._calls_amid_text(may_repeat)
        yield from self._call()

    def _calls(self, may_repeat: bool) -> str:
        match self._syntax.format:
            case "hermes":
                return r'open call ("\n" open call)*' if may_repeat else "open call"
            case "mistral" if self._syntax.names_function_first:
                return "(open call)+" if may_repeat else "open call"
        return "open call"

    def _calls_amid_text(self, may_repeat: bool) -> Iterable[str]:
        """Text, in which an opening marker begins a call wherever it appears."""
        if self._syntax.format == "llama3_json":  # has no marker: a call is the whole output
            yield "start: open call | /([^{](.|\\n)*)?/"
            return
        yield "start: (before call)* after" if may_repeat else "start: before call | after"
        (opening, *_) = self._syntax.markers()
        if self._syntax.marker(opening) is None:
            yield f"before[lazy]: TEXT {_literal(opening)}"
        else:
            yield f"before: TEXT {self._marker(opening)}"
        yield "after: TEXT"
        yield _ANY_TEXT

    def _call(self) -> Iterable[str]:
        match self._syntax.format:
            case "hermes":
                yield f"open: {self._marker('<tool_call>')}"
                yield rf'call: "\n" function "\n" {self._marker("</tool_call>")}'
            case "mistral":
                yield f"open: {self._marker('[TOOL_CALLS]')}"
                if self._syntax.names_function_first:
                    yield "call: function"
                else:
                    more = ' ("," " "? function)*' if self._use.parallel else ""
                    yield f'call: " "? "[" function{more} "]"'
            case "llama3_json":
                yield 'open: ""'
                yield "call: function"

    def functions(self, functions: Sequence[dict[str, Any]]) -> Iterable[str]:
        """One rule per function, and one for its arguments."""
        yield "function: " + " | ".join(f"function_{index}" for index in range(len(functions)))
        for index, function in enumerate(functions):
            name, schema = json.dumps(function["name"]), function.get("parameters") or _NO_ARGUMENTS
            if self._syntax.format == "mistral" and self._syntax.names_function_first:
                yield f"function_{index}: {name} {self._marker('[ARGS]')} arguments_{index}"
            else:
                key = "parameters" if self._syntax.format == "llama3_json" else "arguments"
                head = _literal(f'{{"name": {name}, "{key}": ')
                yield f'function_{index}: {head} arguments_{index} "}}"'
            lenient = function["name"] not in self._use.strict
            yield f"arguments_{index}: %json {_with_options(schema, lenient=lenient)}"

    def _marker(self, text: str) -> str:
        token_id = self._syntax.marker(text)
        return _literal(text) if token_id is None else f"<[{token_id}]>"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _with_options(schema: dict[str, Any], *, lenient: bool) -> str:
    """``schema`` on one line, with the library's options, which win over what the schema says."""
    return json.dumps({**schema, "x-guidance": schema_options(lenient=lenient)}, ensure_ascii=False)
