"""Cleaned examples enter, tokens with their targets leave: the pieces that will be packed into sequences.

N tokens of a document, P of a piece. Targets are what a model is to predict: every token of an ``lm`` document but
its first; in conversations the assistant's turns with the token that ends them; none for ``classify``.
"""

from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from cluster.config.jobs_train import JobTask
from train_jobs.data.cleaning import Example, Malformed, Message
from train_jobs.data.shard_writer import Piece
from train_jobs.data.tokenizer import TokenizerText

_SECOND, _THIRD, _FOURTH = 0x80, 0x800, 0x10000
"""Code points from which UTF-8 takes two, three and four bytes."""


class Tokenized:
    """One document's pieces: any number for ``lm``, one for ``sft`` and ``classify``, two sides for ``dpo``."""

    __slots__ = ("pieces", "truncated")

    def __init__(self, pieces: list[Piece], *, truncated: bool) -> None:
        self.pieces = pieces
        """Empty when nothing is left to learn from."""
        self.truncated = truncated


def tokenize(
    task: JobTask, examples: Sequence[Example], tokenizer: TokenizerText, sequence_tokens: int
) -> list[Tokenized | Malformed]:
    """Each example's tokens, cut into sequences of at most ``sequence_tokens``; Malformed for what cannot be written.

    ``lm`` documents go on in the next piece, which begins with the last token of the one before, so that every token
    is a target once. Others are cut off.
    """
    if task == "lm":
        backend = tokenizer.backend(plain_text=True, max_tokens=None)
        encodings = backend.encode_batch([example.text for example in examples])
        return [
            Tokenized(_lm_pieces(example.text, encoding, tokenizer.eos_token_id, sequence_tokens), truncated=False)
            for example, encoding in zip(examples, encodings, strict=True)
        ]
    if task == "classify":
        backend = tokenizer.backend(plain_text=True, max_tokens=sequence_tokens)
        return [_whole(encoding) for encoding in backend.encode_batch([example.text for example in examples])]
    if task == "sft":
        return _conversations([_turns(example.messages) for example in examples], tokenizer, sequence_tokens)
    return _pairs(examples, tokenizer, sequence_tokens)


def _lm_pieces(text: str, encoding: Encoding, eos_token_id: int | None, sequence_tokens: int) -> list[Piece]:
    ids_N = np.array(encoding.ids, dtype=np.int32)
    num_bytes_N = _token_bytes(text, encoding)
    if eos_token_id is not None and (len(ids_N) == 0 or ids_N[-1] != eos_token_id):
        ids_N = np.append(ids_N, np.int32(eos_token_id))
        num_bytes_N = np.append(num_bytes_N, 0)
    mask_N = np.ones(len(ids_N), dtype=np.uint8)
    starts = range(0, max(len(ids_N) - 1, 0), sequence_tokens - 1)
    return [_piece(ids_N, mask_N, num_bytes_N, start, start + sequence_tokens) for start in starts]


def _piece(
    ids_N: NDArray[np.int32], mask_N: NDArray[np.uint8], num_bytes_N: NDArray[np.int64], start: int, stop: int
) -> Piece:
    mask_P = mask_N[start:stop].copy()
    mask_P[:1] = 0  # nothing comes before it
    num_bytes = int(num_bytes_N[start:stop][mask_P == 1].sum())
    return Piece(token_ids_P=ids_N[start:stop], loss_mask_P=mask_P, num_bytes=num_bytes)


def _whole(encoding: Encoding) -> Tokenized:
    ids_N = np.array(encoding.ids, dtype=np.int32)
    piece = Piece(token_ids_P=ids_N, loss_mask_P=np.zeros(len(ids_N), dtype=np.uint8), num_bytes=0)
    return Tokenized([piece] if len(ids_N) else [], truncated=bool(encoding.overflowing))


def _token_bytes(text: str, encoding: Encoding) -> NDArray[np.int64]:
    """UTF-8 bytes of ``text`` that each token adds; of a character's tokens, the first has all its bytes."""
    ends_N = np.array([stop for _, stop in encoding.offsets], dtype=np.int64)
    special_N = np.array(encoding.special_tokens_mask, dtype=bool)
    ends_N = np.maximum.accumulate(ends_N) if len(ends_N) else ends_N
    if not text.isascii():
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        widths = 1 + (points >= _SECOND) + (points >= _THIRD).astype(np.int64) + (points >= _FOURTH)
        ends_N = np.concatenate([[0], np.cumsum(widths)])[ends_N]
    return np.where(special_N, 0, np.diff(ends_N, prepend=0))


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _conversations(
    conversations: list[list[dict[str, str]]],
    tokenizer: TokenizerText,
    sequence_tokens: int,
    *,
    last_only: bool = False,
) -> list[Tokenized | Malformed]:
    rendered = [_render(messages, tokenizer, last_only=last_only) for messages in conversations]
    backend = tokenizer.backend(plain_text=False, max_tokens=None)
    texts = [item[0] for item in rendered if not isinstance(item, Malformed)]
    encodings = iter(backend.encode_batch(texts, add_special_tokens=False))
    return [
        item if isinstance(item, Malformed) else _targets(*item, next(encodings), tokenizer, sequence_tokens)
        for item in rendered
    ]


_Spans = list[tuple[int, int]]


def _render(
    messages: list[dict[str, str]], tokenizer: TokenizerText, *, last_only: bool
) -> tuple[str, _Spans] | Malformed:
    """The conversation as text, and where the assistant's turns lie in it.

    A turn is what the template adds to the prompt for it, so no template has to mark its turns.
    """
    try:
        text = tokenizer.render(messages, add_generation_prompt=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or (last_only and index + 1 < len(messages)):
                continue
            prompt = tokenizer.render(messages[:index], add_generation_prompt=True)
            answered = tokenizer.render(messages[: index + 1], add_generation_prompt=False)
            if not (answered.startswith(prompt) and text.startswith(answered)):
                return Malformed(f"the chat template writes turn {index + 1} differently once other turns follow")
            spans.append((len(prompt), len(answered)))
        return text, spans
    except jinja2.TemplateError as error:
        return Malformed(f"the chat template refuses it: {error}")


def _targets(
    text: str, spans: _Spans, encoding: Encoding, tokenizer: TokenizerText, sequence_tokens: int
) -> Tokenized:
    ids_N = np.array(encoding.ids, dtype=np.int32)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    mask_N = np.zeros(len(ids_N), dtype=np.uint8)
    for start, stop in spans:
        inside = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= stop))
        ends = [index for index, token_id in enumerate(ids_N[inside]) if token_id == tokenizer.eos_token_id]
        mask_N[inside[: ends[-1] + 1] if ends else inside] = 1  # what follows the end of a turn is no answer
    num_bytes_N = _token_bytes(text, encoding)
    if tokenizer.eos_token_id is not None:
        num_bytes_N[ids_N == tokenizer.eos_token_id] = 0  # its name is no text of the conversation's
    piece = _piece(ids_N, mask_N, num_bytes_N, 0, sequence_tokens)
    truncated = len(ids_N) > sequence_tokens
    return Tokenized([piece] if piece.loss_mask_P.any() else [], truncated=truncated)


def _pairs(
    examples: Sequence[Example], tokenizer: TokenizerText, sequence_tokens: int
) -> list[Tokenized | Malformed]:
    def side(answers: list[str]) -> list[Tokenized | Malformed]:
        conversations = [
            [*_turns(example.messages), {"role": "assistant", "content": answer}]
            for example, answer in zip(examples, answers, strict=True)
        ]
        return _conversations(conversations, tokenizer, sequence_tokens, last_only=True)

    chosen = side([example.chosen for example in examples])
    rejected = side([example.rejected for example in examples])
    return [_pair(*both) for both in zip(chosen, rejected, strict=True)]


def _pair(chosen: Any, rejected: Any) -> Tokenized | Malformed:
    for each in (chosen, rejected):
        if isinstance(each, Malformed):
            return each
    complete = chosen.pieces and rejected.pieces
    truncated = chosen.truncated or rejected.truncated
    return Tokenized([*chosen.pieces, *rejected.pieces] if complete else [], truncated=truncated)
