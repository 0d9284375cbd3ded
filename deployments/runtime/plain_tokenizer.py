"""A checkpoint's directory enters, its tokenizer leaves, without transformers wherever tokenizer.json says it all.

Importing transformers takes seconds of CPU and brings torch along. What it does beyond reading ``tokenizer.json`` is
little, and depends on the class that ``tokenizer_config.json`` names: generic classes take the file as it is; some
build the tokenizer anew from its vocabulary, in one known way. Begin and end tokens are the file's affair alone.
:func:`read_tokenizer` covers both, and gives back None for everything else, which is transformers' to read: unknown
classes, code in the checkpoint, tokens that only the configuration knows.
"""

import json
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from deployments.runtime.sandbox import Render, compile_template

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GENERIC_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
# Of these, transformers replaces the class that the checkpoint names, or the tokenizer's parts.
_REPLACED_MODEL_TYPES = ("qwen2", "mistral", "mixtral", "mistral3", "ministral", "ministral3", "phi3", "phimoe")
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PlainTokenizer:
    """The part of a transformers tokenizer that replicas and data preparation use."""

    def __init__(
        self, backend: Tokenizer, special_tokens: dict[str, str], chat_template: str | dict[str, str] | None
    ) -> None:
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self._special_tokens = special_tokens

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if one is named."""
        eos: int | None = self.backend_tokenizer.token_to_id(self._special_tokens.get("eos_token", ""))
        return eos

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named tokens (``eos_token`` and so on) that the checkpoint has, as text."""
        return dict(self._special_tokens)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        tokenize: bool,
        add_generation_prompt: bool,
        asked_at: float | None = None,
    ) -> str:
        """The conversation as the model's prompt; raises what the template raises.

        ``asked_at`` is the Unix time that a template which tells the date is to see, None the time now.
        """
        assert not tokenize, "the caller encodes"
        name = "tool_use" if tools is not None and "tool_use" in self._renders else "default"
        if name not in self._renders:
            raise ValueError(f"the model has the chat templates {', '.join(self._renders)}, and none is the default")
        return self._renders[name](
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
            **({} if asked_at is None else {"strftime_now": datetime.fromtimestamp(asked_at).strftime}),
        )

    @cached_property
    def _renders(self) -> dict[str, Render]:
        templates = self.chat_template
        assert templates is not None, "the caller has asked for a chat template before"
        if isinstance(templates, str):
            templates = {"default": templates}
        return {name: compile_template(source) for name, source in templates.items()}


def read_tokenizer(directory: Path) -> PlainTokenizer | None:
    """The tokenizer of the checkpoint in ``directory``; None when only transformers knows how to read it."""
    file, config_file = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not file.exists() or not config_file.exists():
        return None
    config = json.loads(config_file.read_text(encoding="utf-8"))
    content = file.read_text(encoding="utf-8")
    if not _is_plain(config, json.loads(content), _model_type(directory)):
        return None
    named = {name: _text(config[name]) for name in _NAMED_TOKENS if config.get(name) is not None}
    backend = Tokenizer.from_str(content)
    if not _knows_tokens(backend, config, named) or not _agrees(directory / "special_tokens_map.json", named):
        return None
    return PlainTokenizer(backend, named, _read_chat_template(directory, config))


def _model_type(directory: Path) -> str:
    path = directory / "config.json"
    return str(json.loads(path.read_text(encoding="utf-8")).get("model_type", "")) if path.exists() else ""


def _is_plain(config: dict[str, Any], content: dict[str, Any], model_type: str) -> bool:
    """Whether ``tokenizer.json`` is what transformers would make of it."""
    if "auto_map" in config or config.get("split_special_tokens") or config.get("tokenizer_file"):
        return False
    other_tokens = (key for key in config if key.endswith("_token") and not key.startswith("add_"))
    if any(key not in _NAMED_TOKENS for key in other_tokens):
        return False
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if name in _GENERIC_CLASSES:
        return model_type not in _REPLACED_MODEL_TYPES
    if name == "Qwen2Tokenizer":
        return _is_qwen2(config, content)
    if name == "BertTokenizer":
        return _is_bert(config, content)
    return False


def _is_qwen2(config: dict[str, Any], content: dict[str, Any]) -> bool:
    """Whether the file says what Qwen2's class builds, whose special tokens have no defaults left to fill in."""
    words = {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers") or []
    model = content.get("model") or {}
    return (
        all(name in config for name in ("bos_token", "eos_token", "unk_token", "pad_token"))
        and not config.get("add_prefix_space")
        and content.get("normalizer") == {"type": "NFC"}
        and (content.get("decoder") or {}).get("type") == "ByteLevel"
        and len(steps) == 2
        and steps[0] == words
        and {key: steps[1].get(key) for key in ("type", "add_prefix_space", "use_regex")}
        == {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        and model.get("type") == "BPE"
        and not any(model.get(key) for key in ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges"))
    )


def _is_bert(config: dict[str, Any], content: dict[str, Any]) -> bool:
    """Whether the file says what BERT's class builds from its options."""
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
        "strip_accents": config.get("strip_accents"),
        "lowercase": config.get("do_lower_case", False),
    }
    model = content.get("model") or {}
    return (
        all(name in config for name in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token"))
        and content.get("normalizer") == normalizer
        and content.get("pre_tokenizer") == {"type": "BertPreTokenizer"}
        and (content.get("decoder") or {}).get("type") == "WordPiece"
        and (content.get("post_processor") or {}).get("type") == "TemplateProcessing"
        and model.get("type", "WordPiece") == "WordPiece"
        and model.get("unk_token") == _text(config["unk_token"])
        and model.get("continuing_subword_prefix") == "##"
    )


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _knows_tokens(backend: Tokenizer, config: dict[str, Any], named: dict[str, str]) -> bool:
    """Whether every token that the configuration adds is in the file already, and the same there."""
    added = backend.get_added_tokens_decoder()
    known = {token.content for token in added.values()}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or ()
    if isinstance(extra, dict) or not {*named.values(), *map(_text, extra)} <= known:
        return False
    for token_id, wanted in (config.get("added_tokens_decoder") or {}).items():
        token = added.get(int(token_id))
        if token is None or any(getattr(token, key) != value for key, value in wanted.items() if hasattr(token, key)):
            return False
    return True


def _agrees(path: Path, named: dict[str, str]) -> bool:
    """Whether an older release's file of special tokens says nothing else."""
    if not path.exists():
        return True
    content = json.loads(path.read_text(encoding="utf-8"))
    return all(named.get(name) == _text(content[name]) for name in _NAMED_TOKENS if content.get(name) is not None)


def _read_chat_template(directory: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """The template, or several by name; files go before the configuration."""
    templates = {}
    default = directory / "chat_template.jinja"
    if default.exists():
        templates["default"] = default.read_text(encoding="utf-8")
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if not templates:
        told: str | list[dict[str, str]] | None = config.get("chat_template")
        if not isinstance(told, list):
            return told
        templates = {each["name"]: each["template"] for each in told}
    return templates["default"] if templates.keys() == {"default"} else templates
