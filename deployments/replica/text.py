"""Prompts become token ids, and token ids become text, one token at a time.

:class:`TextTokenizer` wraps a model's fast tokenizer. :class:`TokenStream` turns tokens into text that never ends in
half a character.

Most tokenizers spell a token as bytes (byte-level BPE; sentencepiece with byte fallback). For those the text is the
UTF-8 decoding of the tokens' bytes, in time independent of the length, and the same bytes serve ``logprobs``. Any
other decoder (WordPiece) goes through ``tokenizers.decoders.DecodeStream``.
"""

import codecs
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from deployments.messages import (
    ChatPrompt,
    ChosenLogprob,
    Detokenize,
    Detokenized,
    Prompt,
    Sample,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenLogprob,
    TokenPrompt,
    ToolFormat,
    refuse,
)
from deployments.replica.template import ChatTemplate
from deployments.runtime.plain_tokenizer import read_tokenizer

logger = logging.getLogger(__name__)

Spelling = Literal["byte_level", "sentencepiece", "other"]

_PROBE_CHARACTERS_PER_TOKEN = 8  # ordinary text has about four
_SPACE_MARK = "\u2581"
_SENTENCEPIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_utf8_replacing = codecs.getincrementaldecoder("utf-8")


class TokenStream(Protocol):
    """Incremental detokenization of one sequence."""

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that is now certain, which may be empty."""
        ...


class TextTokenizer:
    """A model's tokenizer: encodes prompts, spells tokens, and knows which tokens end a text.

    ``tokenizer`` is a :class:`PlainTokenizer`, or a transformers tokenizer with a ``tokenizers`` backend; ValueError
    for one without.
    ``num_embeddings`` is how many token ids the model reads; a tokenizer may know more (Gemma 3's names an image),
    and a prompt with one of those is refused, because no stage survives it. ``tool_format`` is how the model writes
    calls, where its chat template does not tell.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos_token_ids: Iterable[int],
        *,
        num_embeddings: int | None = None,
        tool_format: ToolFormat | None = None,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                f"{type(tokenizer).__name__} is not backed by the tokenizers library, so it cannot be decoded "
                "incrementally; convert it to a tokenizer.json"
            )
        # An input that is too long is refused, never cut; batches are padded by the model runtime.
        backend.no_truncation()
        backend.no_padding()
        self.eos_token_ids = tuple(eos_token_ids)
        num_known = backend.get_vocab_size(with_added_tokens=True)
        self.vocab_size = num_known if num_embeddings is None else min(num_known, num_embeddings)
        # A model may have more rows of embedding than its tokenizer has tokens, and emit what has no text.
        self.num_token_ids = num_known if num_embeddings is None else num_embeddings
        self._tokenizer = tokenizer
        self._backend = backend
        self._spelling = _spelling(json.loads(backend.to_str()).get("decoder"))
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._added_ids = {content: token_id for token_id, content in self._added.items()}
        self.template = ChatTemplate(tokenizer, self._added_ids, tool_format)
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, directory: Path, *, tool_format: ToolFormat | None = None) -> "TextTokenizer":
        """Read tokenizer, end tokens and number of embeddings of the checkpoint in ``directory``."""
        tokenizer = read_tokenizer(directory) or _read_with_transformers(directory)
        eos_token_ids = read_eos_token_ids(directory, tokenizer.eos_token_id)
        return cls(tokenizer, eos_token_ids, num_embeddings=_read_num_embeddings(directory), tool_format=tool_format)

    def encode(self, prompt: Prompt, *, request_id: str, context_tokens: int) -> list[int]:
        """Token ids of a prompt, at least one; raises RequestRefused. Safe to call from several threads.

        May return more than ``context_tokens``; only a text that is far beyond them is refused here.
        """
        if isinstance(prompt, TextPrompt):
            text, add_special_tokens = prompt.text, prompt.add_special_tokens
        elif isinstance(prompt, ChatPrompt):
            text, add_special_tokens = self.template.render(prompt, request_id), False
        if not isinstance(prompt, TokenPrompt):
            token_ids = self.encode_text(
                text,
                request_id=request_id,
                context_tokens=context_tokens,
                add_special_tokens=add_special_tokens,
                param=prompt_param(prompt),
            )
        else:
            token_ids = list(prompt.token_ids)
            self._check_known(token_ids, request_id, "prompt")
        if not token_ids:
            message = "the prompt has no tokens; write at least one"
            raise refuse(request_id, "invalid_request", message, param=prompt_param(prompt))
        return token_ids

    def encode_text(
        self,
        text: str,
        *,
        request_id: str,
        context_tokens: int,
        add_special_tokens: bool = True,
        param: str = "prompt",
    ) -> list[int]:
        """Token ids of ``text``, which may be empty; RequestRefused for text that is not Unicode, or far too long."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
            raise refuse(request_id, "invalid_request", f"{message}; send valid Unicode", param=param) from error
        self._check_size(text, request_id, context_tokens, param)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        self._check_known(ids, request_id, param)
        return ids

    def _check_size(self, text: str, request_id: str, context_tokens: int, param: str) -> None:
        """Refuse a text whose beginning alone has twice the context, without the cost of tokenizing all of it.

        Twice, because the tokens at the cut may differ from those of the whole text.
        """
        num_characters = _PROBE_CHARACTERS_PER_TOKEN * context_tokens
        while num_characters < len(text):
            num_tokens = len(self._backend.encode(text[:num_characters], add_special_tokens=False).ids)
            if num_tokens > 2 * context_tokens:
                message = (
                    f"this model's context is {context_tokens} tokens, but the first {num_characters} of "
                    f"{len(text)} characters alone have {num_tokens}; shorten the text"
                )
                raise refuse(request_id, "context_length_exceeded", message, param=param)
            num_characters *= 4

    def encode_inputs(
        self, inputs: Sequence[str | tuple[int, ...]], *, request_id: str, context_tokens: int
    ) -> list[tuple[int, ...]]:
        """Token ids of each input of an embedding request, none of them empty; raises RequestRefused."""
        encoded = []
        for index, item in enumerate(inputs):
            if isinstance(item, str):
                token_ids = tuple(
                    self.encode_text(item, request_id=request_id, context_tokens=context_tokens, param="input")
                )
            else:
                token_ids = item
                self._check_known(token_ids, request_id, "input")
            if not token_ids:
                message = f"input {index} has no tokens; write at least one"
                raise refuse(request_id, "invalid_request", message, param="input")
            encoded.append(token_ids)
        return encoded

    def _check_known(self, token_ids: Sequence[int], request_id: str, param: str) -> None:
        if not token_ids or (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            return
        unknown = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
        message = f"token id {unknown} is not in the vocabulary; allowed: 0 to {self.vocab_size - 1}"
        raise refuse(request_id, "invalid_request", message, param=param)

    def is_special(self, text: str) -> bool:
        """Whether ``text`` is a token that is left out of what clients see."""
        return self._added_ids.get(text) in self._special

    def tokenize(self, request: Tokenize, context_tokens: int) -> Tokenized:
        """Answer a Tokenize; raises RequestRefused."""
        token_ids = self.encode(request.prompt, request_id=request.request_id, context_tokens=context_tokens)
        return Tokenized(
            request_id=request.request_id,
            token_ids=tuple(token_ids),
            token_texts=tuple(self.token_text(token_id) for token_id in token_ids),
            context_tokens=context_tokens,
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; an incomplete character shows as U+FFFD."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenize(self, request: Detokenize) -> Detokenized:
        """Answer a Detokenize, special tokens shown; raises RequestRefused for ids outside the vocabulary."""
        self._check_known(request.token_ids, request.request_id, "tokens")
        text = self.decode(request.token_ids, skip_special_tokens=False)
        return Detokenized(request_id=request.request_id, text=text)

    def stream(self, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True) -> TokenStream:
        """Begin to decode what follows ``prompt_ids``; a word's leading space is kept, as it continues a text."""
        skipped = self._special if skip_special_tokens else frozenset[int]()
        if self._spelling == "other":
            return _WindowStream(self._backend, prompt_ids, skip_special_tokens=skip_special_tokens)
        at_start = self._spelling == "sentencepiece" and self._special.issuperset(prompt_ids)
        return _ByteStream(self, skipped, strip_space=at_start)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, possibly part of a character; empty for ids without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        token = self._added.get(token_id) or self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._spelling == "byte_level":
            return _spell_byte_level(token)
        if self._spelling == "sentencepiece" and token_id not in self._added:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace(_SPACE_MARK, " ").encode()
        return token.encode()

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own; bytes that are no character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def logprobs(self, sample: Sample) -> ChosenLogprob:
        """Spell a sample's log-probabilities out; they must have been asked for."""
        assert sample.logprob is not None, "the stage sent no logprob for a sample that asked for it; this is a bug"
        return ChosenLogprob(
            self._token_logprob(sample.token_id, sample.logprob),
            tuple(self._token_logprob(token_id, logprob) for token_id, logprob in sample.top),
        )

    def _token_logprob(self, token_id: int, logprob: float) -> TokenLogprob:
        raw = self.token_bytes(token_id)
        return TokenLogprob(token_id, raw.decode("utf-8", errors="replace"), raw, logprob)


class _ByteStream:
    """Concatenates the tokens' bytes and lets whole characters through."""

    def __init__(self, tokenizer: TextTokenizer, skipped: frozenset[int], *, strip_space: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._strip_space = strip_space
        self._decoder = _utf8_replacing(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        raw = self._tokenizer.token_bytes(token_id)
        if self._strip_space and raw:
            raw = raw.removeprefix(b" ")
            self._strip_space = False
        return self._decoder.decode(raw)


class _WindowStream:
    """Decodes a short window of tokens again and again; for decoders whose tokens have no bytes of their own."""

    def __init__(self, backend: Tokenizer, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._stream = DecodeStream(ids=list(prompt_ids[-8:]), skip_special_tokens=skip_special_tokens)

    def push(self, token_id: int) -> str:
        piece: str | None = self._stream.step(self._backend, token_id)
        return piece or ""


def _read_with_transformers(directory: Path) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - heavy; only a tokenizer that needs it pays for it

    logger.info("the tokenizer in %s is read with transformers", directory)
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def read_eos_token_ids(directory: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Tokens that end a text: of ``generation_config.json``, else of ``config.json``, else the tokenizer's own.

    The same order of precedence as transformers' ``generate``.
    """
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        eos = content.get("eos_token_id", content.get("text_config", {}).get("eos_token_id"))
        if eos is not None:
            return (eos,) if isinstance(eos, int) else tuple(eos)
    return () if tokenizer_eos is None else (tokenizer_eos,)


def _read_num_embeddings(directory: Path) -> int | None:
    path = directory / "config.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    size: int | None = content.get("vocab_size", content.get("text_config", {}).get("vocab_size"))
    return size


def prompt_param(prompt: Prompt) -> str:
    """The OpenAI field that a prompt came in."""
    return "messages" if isinstance(prompt, ChatPrompt) else "prompt"


def _spelling(decoder: dict[str, Any] | None) -> Spelling:
    """How the tokens of a ``tokenizer.json`` with this decoder spell bytes."""
    if decoder is None:
        return "other"
    steps = {step["type"] for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps and steps <= {"ByteLevel", "Fuse"}:
        return "byte_level"
    return "sentencepiece" if steps <= _SENTENCEPIECE_STEPS else "other"


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters and the bytes they stand for (Radford et al. 2019).

    Printable Latin-1 characters stand for themselves, all other bytes for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


def _spell_byte_level(token: str) -> bytes:
    if all(character in _BYTE_LEVEL for character in token):
        return bytes(_BYTE_LEVEL[character] for character in token)
    return token.encode()  # an added token outside the alphabet is taken as it is written
