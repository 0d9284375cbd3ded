"""Examples become tokens with targets; every target once, and their bytes add up to the text."""

from pathlib import Path

import numpy as np
import pytest

from cluster.registry.store import Registry
from tests.support.corpora import END_ID, save_tokenizer
from train_jobs.data.cleaning import Example, Malformed, Message
from train_jobs.data.shard_writer import Piece
from train_jobs.data.tokenizer import TokenizerText, find_tokenizer
from train_jobs.data.tokenizing import Tokenized, tokenize


@pytest.fixture
def tokenizer(tmp_path: Path) -> TokenizerText:
    return load(tmp_path / "tokenizer")


def load(directory: Path, **options: object) -> TokenizerText:
    source = save_tokenizer(directory, **options)  # type: ignore[arg-type]
    return find_tokenizer(source, Registry(str(directory.parent / "storage")), lambda *_: None).text


def spell(piece: Piece, tokenizer: TokenizerText, *, targets: bool = False) -> str:
    ids = piece.token_ids_P[piece.loss_mask_P == 1] if targets else piece.token_ids_P
    backend = tokenizer.backend(plain_text=False, max_tokens=None)
    return str(backend.decode(ids.tolist(), skip_special_tokens=False))


def one(result: Tokenized | Malformed) -> Piece:
    assert isinstance(result, Tokenized)
    (piece,) = result.pieces
    return piece


@pytest.mark.parametrize("text", ["abcdefghijklmnopqrstuvwxyz", "größer 世界 🙂 ende", "x"])
@pytest.mark.parametrize("size", [2, 3, 8, 100])
def test_a_long_document_goes_on_and_every_token_is_a_target_once(
    tokenizer: TokenizerText, text: str, size: int
) -> None:
    (result,) = tokenize("lm", [Example(text=text)], tokenizer, size)
    assert isinstance(result, Tokenized)
    assert not result.truncated
    targets = np.concatenate([piece.token_ids_P[piece.loss_mask_P == 1] for piece in result.pieces])
    whole = [*tokenizer.backend(plain_text=True, max_tokens=None).encode(text).ids, END_ID]
    assert targets.tolist() == whole[1:]
    assert all(len(piece) <= size and piece.loss_mask_P[0] == 0 for piece in result.pieces)
    for before, after in zip(result.pieces, result.pieces[1:], strict=False):
        assert before.token_ids_P[-1] == after.token_ids_P[0]
    first_character = len(text[0].encode())
    assert sum(piece.num_bytes for piece in result.pieces) == len(text.encode()) - first_character


def test_plain_text_never_becomes_a_special_token(tokenizer: TokenizerText) -> None:
    (result,) = tokenize("lm", [Example(text="a<|end|>b")], tokenizer, 64)
    assert one(result).token_ids_P.tolist().count(END_ID) == 1
    assert spell(one(result), tokenizer) == "a<|end|>b<|end|>"


def test_classify_is_cut_and_has_no_targets(tokenizer: TokenizerText) -> None:
    short, long, empty = tokenize("classify", [Example(text=text) for text in ("ab", "abcdef", "")], tokenizer, 4)
    assert isinstance(long, Tokenized)
    assert isinstance(short, Tokenized)
    assert isinstance(empty, Tokenized)
    assert (spell(one(long), tokenizer), long.truncated) == ("abcd", True)
    assert (spell(one(short), tokenizer), short.truncated) == ("ab", False)
    assert not one(long).loss_mask_P.any()
    assert empty.pieces == []


def talk(*turns: str, first: str = "user") -> Example:
    roles = ("user", "assistant") if first == "user" else ("system", "user", "assistant", "user", "assistant")
    return Example(messages=tuple(Message(role=roles[n % len(roles)], content=turn) for n, turn in enumerate(turns)))


def test_only_the_assistants_turns_are_targets(tokenizer: TokenizerText) -> None:
    (result,) = tokenize("sft", [talk("be kind", "hé", "hällo", "bye", "ciao", first="system")], tokenizer, 200)
    piece = one(result)
    assert spell(piece, tokenizer) == (
        "<|system|>be kind\n<|user|>hé\n<|assistant|>hällo<|end|>\n<|user|>bye\n<|assistant|>ciao<|end|>\n"
    )
    assert spell(piece, tokenizer, targets=True) == "hällo<|end|>ciao<|end|>"
    assert piece.num_bytes == len("hällociao".encode())


def test_a_conversation_is_cut_and_may_have_nothing_left(tokenizer: TokenizerText) -> None:
    example = talk("hi", "hello")
    prompt = len("<|user|>hi\n<|assistant|>")
    cut, empty = (tokenize("sft", [example], tokenizer, size)[0] for size in (prompt + 3, prompt))
    assert isinstance(cut, Tokenized)
    assert isinstance(empty, Tokenized)
    assert (spell(one(cut), tokenizer, targets=True), cut.truncated) == ("hel", True)
    assert (empty.pieces, empty.truncated) == ([], True)


def test_pairs_learn_from_the_last_answer_only(tokenizer: TokenizerText) -> None:
    prompt = (*talk("hi", "hello").messages, Message(role="user", content="more"))
    (result,) = tokenize("dpo", [Example(messages=prompt, chosen="yes", rejected="no")], tokenizer, 200)
    assert isinstance(result, Tokenized)
    chosen, rejected = result.pieces
    assert spell(chosen, tokenizer, targets=True) == "yes<|end|>"
    assert spell(rejected, tokenizer, targets=True) == "no<|end|>"
    assert spell(chosen, tokenizer).startswith("<|user|>hi\n<|assistant|>hello<|end|>\n<|user|>more")


def test_what_a_template_refuses_is_malformed(tokenizer: TokenizerText) -> None:
    good, bad = tokenize("sft", [talk("hi", "hello"), talk("forbidden", "hello")], tokenizer, 64)
    assert isinstance(good, Tokenized)
    assert isinstance(bad, Malformed)
    assert str(bad) == "the chat template refuses it: not that"


def test_a_template_that_rewrites_earlier_turns_is_noticed(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role + ':' + (m.content if loop.last or m.role == 'user' else '...') }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = load(tmp_path / "tokenizer", chat_template=template)
    (result,) = tokenize("sft", [talk("a", "b", "c", "d")], tokenizer, 64)
    assert str(result) == "the chat template writes turn 2 differently once other turns follow"


def test_a_template_is_told_one_date(tmp_path: Path) -> None:
    template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = load(tmp_path / "tokenizer", chat_template=template)
    assert tokenizer.render([{"role": "user", "content": "x"}], add_generation_prompt=False) == "2026-01-01x"
