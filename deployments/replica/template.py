"""A model's own chat template: a conversation and its tools enter, the prompt's text leaves, or a refusal."""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from deployments.messages import ChatPrompt, ToolFormat, refuse
from deployments.replica.tools import (
    TEMPLATE_ERRORS,
    CallSyntax,
    find_tool_format,
    speaks_of_tools,
    template_knows_tools,
    template_messages,
)
from deployments.runtime.plain_tokenizer import PlainTokenizer


class ChatTemplate:
    """Renders conversations, and knows how the model writes calls of tools.

    ``added_ids`` are the tokens added to the vocabulary and their ids; ``tool_format`` overrides what the template
    tells of calls.
    """

    def __init__(self, tokenizer: Any, added_ids: Mapping[str, int], tool_format: ToolFormat | None = None) -> None:
        self._tokenizer = tokenizer
        self._added_ids = added_ids
        self._tool_format = tool_format

    def render(self, prompt: ChatPrompt, request_id: str) -> str:
        """The text of a conversation; raises RequestRefused."""
        if not getattr(self._tokenizer, "chat_template", None):
            message = "this model has no chat template, so it cannot chat; use /v1/completions"
            raise refuse(request_id, "unsupported", message, param="messages")
        if speaks_of_tools(prompt) and not self._knows_tools:
            message = "this model's chat template knows no tools; leave out 'tools' and what came of them"
            raise refuse(request_id, "unsupported", message, param="tools" if prompt.tools else "messages")
        tools = [json.loads(tool) for tool in prompt.tools] or None
        try:
            return self._apply(template_messages(prompt), tools, prompt.add_generation_prompt, prompt.asked_at)
        except TEMPLATE_ERRORS as error:
            message = f"the model's chat template does not take these messages: {error}"
            raise refuse(request_id, "invalid_request", message, param="messages") from error

    def _apply(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool = True,
        asked_at: float | None = None,
    ) -> str:
        # transformers takes no clock: what only it can read sees the time now
        clock = {"asked_at": asked_at} if isinstance(self._tokenizer, PlainTokenizer) else {}
        text = self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **clock
        )
        return str(text)

    @cached_property
    def _knows_tools(self) -> bool:
        return template_knows_tools(self._apply)

    @cached_property
    def call_syntax(self) -> CallSyntax | None:
        """How the model writes calls; None where neither its template nor the configuration tells."""
        template = self._tokenizer.chat_template or ""
        if isinstance(template, dict):  # several by name, as transformers has it
            template = template.get("tool_use") or template.get("default", "")
        tool_format = self._tool_format or find_tool_format(template)
        if tool_format is None:
            return None
        names_function_first = tool_format == "mistral" and "[ARGS]" in template
        return CallSyntax(format=tool_format, marker=self._added_ids.get, names_function_first=names_function_first)
