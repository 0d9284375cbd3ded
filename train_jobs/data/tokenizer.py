"""The URI of a model enters, its tokenizer leaves: as files to keep beside the data, and as text that travels.

``TokenizerText`` is small and pickles; ``backend()`` and ``render()`` make the working parts of it, once per process.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError
from tokenizers import Tokenizer

from cluster.config.sources import HfSource, PathSource, RegistrySource, parse_source
from cluster.errors import DataError, SourceError
from cluster.registry.materialize import materialize
from cluster.registry.positions import max_positions
from cluster.registry.progress import Progress
from cluster.registry.sources.hub import download_tokenizer
from cluster.registry.store import Registry
from cluster.registry.tree import file_sha256
from cluster.runs.prepared import TOKENIZER_FOLDER, TokenizerEntry
from deployments.runtime.plain_tokenizer import read_tokenizer
from deployments.runtime.sandbox import Render, compile_template

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "config.json",
)
"""What a tokenizer is read from; ``config.json`` is read for the model's type, and is not the tokenizer's."""
_TOLD_DATE = datetime(2026, 1, 1, tzinfo=UTC)
"""The date that a chat template is told; the same data must be the same bytes tomorrow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerText:
    """A tokenizer, written out."""

    content: str
    """``tokenizer.json``."""
    chat_template: str | None
    special_tokens: tuple[tuple[str, str], ...]
    """Named tokens (``eos_token``), as a chat template sees them."""
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int
    vocab_size: int

    def backend(self, *, plain_text: bool, max_tokens: int | None) -> Tokenizer:
        """The tokenizer; ``plain_text`` reads names of special tokens as any text, ``max_tokens`` truncates."""
        return _backend(self.content, plain_text, max_tokens)

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The conversation as the model reads it; jinja2.TemplateError is the template's own refusal."""
        assert self.chat_template is not None, "the caller has checked that there is one"
        return _compiled(self.chat_template)(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=_TOLD_DATE.strftime,
            **dict(self.special_tokens),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTokenizer:
    """A tokenizer on this machine."""

    directory: Path
    entry: TokenizerEntry
    text: TokenizerText

    def copy_to(self, directory: Path) -> list[Path]:
        """Copy its files below ``directory``; their paths there."""
        target = directory / TOKENIZER_FOLDER
        target.mkdir()
        kept = [name for name in _present(self.directory) if name != "config.json"]
        return [Path(shutil.copyfile(self.directory / name, target / name)) for name in kept]


def find_tokenizer(source: str, registry: Registry, progress: Progress) -> FoundTokenizer:
    """The tokenizer of a model; SourceError or RegistryError when there is none to be had."""
    directory = _locate(source, registry, progress)
    tokenizer: Any = read_tokenizer(directory)
    if tokenizer is None:
        tokenizer = _read_with_transformers(source, directory)
    text = _write_out(tokenizer)
    digest = hashlib.sha256()
    for name in _present(directory):
        if name != "config.json":
            digest.update(f"{name}\0{file_sha256(directory / name)}\n".encode())
    entry = TokenizerEntry(
        source=source,
        digest=digest.hexdigest(),
        vocab_size=text.vocab_size,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        context_tokens=_context_tokens(directory),
    )
    return FoundTokenizer(directory=directory, entry=entry, text=text)


def _locate(source: str, registry: Registry, progress: Progress) -> Path:
    try:
        parsed = parse_source(source)
    except PydanticCustomError as error:
        context = error.context or {}
        raise SourceError(f"tokenizer {source!r} {context.get('message')}; {context.get('remedy')}") from error
    if isinstance(parsed, RegistrySource):
        return materialize(registry, registry.resolve(f"{parsed.model}@{parsed.reference}"), progress=progress)
    if isinstance(parsed, HfSource):
        return download_tokenizer(parsed, progress)
    if isinstance(parsed, PathSource) and Path(parsed.path).is_dir():
        return Path(parsed.path)
    raise SourceError(
        f"tokenizer {source}: give a directory (path://), a version (registry://) or a repository (hf://); a wheel "
        "or a single file is imported as a model first: `manta models import`"
    )


def _present(directory: Path) -> list[str]:
    return [name for name in TOKENIZER_FILES if (directory / name).is_file()]


def _read_with_transformers(source: str, directory: Path) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - heavy; only a tokenizer that needs it pays for it

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SourceError(f"tokenizer {source}: {directory} has none that can be read: {error}") from error
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise SourceError(f"tokenizer {source}: {type(tokenizer).__name__} is not backed by the tokenizers library")
    return tokenizer


def _write_out(tokenizer: Any) -> TokenizerText:
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    ids = {name: backend.token_to_id(token) for name, token in named.items()}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    eos = ids.get("eos_token")
    pad = ids.get("pad_token")
    return TokenizerText(
        content=backend.to_str(),
        chat_template=template,
        special_tokens=tuple(sorted(named.items())),
        bos_token_id=ids.get("bos_token"),
        eos_token_id=eos,
        pad_token_id=next((token_id for token_id in (pad, eos) if token_id is not None), 0),
        vocab_size=backend.get_vocab_size(with_added_tokens=True),
    )


def _context_tokens(directory: Path) -> int | None:
    path = directory / "config.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return max_positions(content)


def check_chat_template(tokenizer: FoundTokenizer) -> None:
    """DataError when conversations cannot be written with this tokenizer."""
    if tokenizer.text.chat_template is None:
        raise DataError(
            f"tokenizer {tokenizer.entry.source} has no chat template, which sft and dpo need; use that of a chat "
            "model, or put a chat_template.jinja beside it"
        )


@lru_cache(maxsize=4)
def _backend(content: str, plain_text: bool, max_tokens: int | None) -> Tokenizer:
    backend = Tokenizer.from_str(content)
    backend.encode_special_tokens = plain_text
    if max_tokens is not None:
        backend.enable_truncation(max_tokens)
    return backend


@lru_cache(maxsize=4)
def _compiled(template: str) -> Render:
    return compile_template(template)
