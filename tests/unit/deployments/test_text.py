import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.messages import ChatPrompt, Detokenize, RequestRefused, Sample, TextPrompt, Tokenize, TokenPrompt
from deployments.replica.stops import StopChecker
from deployments.replica.text import TextTokenizer, read_eos_token_ids
from tests.support.tiny_tokenizer import (
    EOS_ID,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    tiny_text,
    wordpiece_tokenizer,
)

TEXT = tiny_text()
SENTENCEPIECE = TextTokenizer(sentencepiece_tokenizer(), (EOS_ID,))
WORDPIECE = TextTokenizer(wordpiece_tokenizer(), (EOS_ID,))


def stream_text(tokenizer, prompt_ids, token_ids, **options):
    stream = tokenizer.stream(prompt_ids, **options)
    return [stream.push(token_id) for token_id in token_ids]


@given(st.text(), st.booleans())
def test_byte_level_stream_gives_back_any_text(text, skip):
    token_ids = TEXT.encode_text(text, request_id="r", context_tokens=64)
    assert "".join(stream_text(TEXT, [], token_ids, skip_special_tokens=skip)) == TEXT.decode(
        token_ids, skip_special_tokens=skip
    )


@given(st.lists(st.integers(0, TEXT.vocab_size - 1), max_size=40), st.booleans())
def test_byte_level_stream_equals_full_decoding_minus_an_incomplete_tail(token_ids, skip):
    pieces = stream_text(TEXT, [], token_ids, skip_special_tokens=skip)
    whole = TEXT.decode(token_ids, skip_special_tokens=skip)
    streamed = "".join(pieces)
    assert whole.startswith(streamed)
    assert whole[len(streamed) :] in ("", "\ufffd")


def test_no_piece_ends_in_half_a_character():
    token_ids = TEXT.encode_text("a\u00e9\u4e16\U0001f600z", request_id="r", context_tokens=64)
    pieces = stream_text(TEXT, [], token_ids)
    assert [piece for piece in pieces if piece] == ["a", "\u00e9", "\u4e16", "\U0001f600", "z"]
    assert len(token_ids) == 1 + 2 + 3 + 4 + 1


def test_added_tokens_outside_the_byte_alphabet_are_decoded_as_written():
    token_ids = TEXT.encode_text("x<|tag \u4e16|>y", request_id="r", context_tokens=64)
    assert len(token_ids) == 3
    assert "".join(stream_text(TEXT, [], token_ids)) == "x<|tag \u4e16|>y"


def test_special_tokens_are_shown_only_when_asked_for():
    assert stream_text(TEXT, [], [EOS_ID]) == [""]
    assert stream_text(TEXT, [], [EOS_ID], skip_special_tokens=False) == ["<|end|>"]


def sentencepiece_ids(*tokens):
    return [SENTENCEPIECE._backend.token_to_id(token) for token in tokens]


@given(
    st.lists(
        st.sampled_from(["\u2581", "\u2581hello", "\u2581world", "a", "b", "\u00e9", "\u2581\u4e16"]), max_size=20
    )
)
def test_sentencepiece_stream_continues_the_prompt(tokens):
    prompt_ids = sentencepiece_ids("<s>", "\u2581hello")
    token_ids = sentencepiece_ids(*tokens)
    whole = SENTENCEPIECE.decode(prompt_ids + token_ids)
    assert "hello" + "".join(stream_text(SENTENCEPIECE, prompt_ids, token_ids)) == whole


def test_sentencepiece_stream_after_nothing_but_special_tokens_drops_the_first_space():
    token_ids = sentencepiece_ids("\u2581hello", "\u2581world")
    assert "".join(stream_text(SENTENCEPIECE, sentencepiece_ids("<s>"), token_ids)) == "hello world"
    assert SENTENCEPIECE.decode(token_ids) == "hello world"


def test_byte_fallback_waits_for_the_whole_character_and_survives_invalid_bytes():
    token_ids = sentencepiece_ids("a", "<0xE4>", "<0xB8>", "<0x96>", "<0xFF>", "b")
    assert stream_text(SENTENCEPIECE, [1, 5], token_ids) == ["a", "", "", "\u4e16", "\ufffd", "b"]


def test_wordpiece_stream_joins_word_pieces():
    token_ids = [
        WORDPIECE._backend.token_to_id(word) for word in ("world", "##s", ",", "caf\u00e9", "##ly", "[SEP]", ".")
    ]
    prompt_ids = [WORDPIECE._backend.token_to_id("hello")]
    assert "hello" + "".join(stream_text(WORDPIECE, prompt_ids, token_ids)) == WORDPIECE.decode(
        prompt_ids + token_ids
    )


@pytest.mark.parametrize(
    ("tokenizer", "token", "raw"),
    [
        (TEXT, "\u0120world", b" world"),
        (TEXT, "\u00c3", b"\xc3"),
        (TEXT, "<|end|>", b"<|end|>"),
        (SENTENCEPIECE, "<0xE4>", b"\xe4"),
        (SENTENCEPIECE, "\u2581\u4e16", b" \xe4\xb8\x96"),
        (SENTENCEPIECE, "</s>", b"</s>"),
        (WORDPIECE, "##s", b"##s"),
    ],
)
def test_token_bytes(tokenizer, token, raw):
    token_id = tokenizer._backend.token_to_id(token)
    assert tokenizer.token_bytes(token_id) == raw


def test_logprobs_spell_half_characters_as_bytes():
    half = TEXT._backend.token_to_id("\u00c3")
    chosen = TEXT.logprobs(Sample(1, half, -0.5, ((half, -0.5), (EOS_ID, -2.0))))
    assert (chosen.chosen.text, chosen.chosen.raw, chosen.chosen.logprob) == ("\ufffd", b"\xc3", -0.5)
    assert [(top.text, top.logprob) for top in chosen.top] == [("\ufffd", -0.5), ("<|end|>", -2.0)]


def test_ids_without_a_token_have_no_text():
    assert TEXT.token_bytes(100_000) == b""
    assert stream_text(TEXT, [], [100_000]) == [""]


def test_chat_prompts_go_through_the_models_template():
    messages = ({"role": "user", "content": "hello"},)
    assert (
        TEXT.decode(TEXT.encode(ChatPrompt(messages=messages), request_id="r", context_tokens=64))
        == "<|user|>hello\n<|assistant|>"
    )
    assert (
        TEXT.decode(
            TEXT.encode(ChatPrompt(messages=messages, add_generation_prompt=False), request_id="r", context_tokens=64)
        )
        == "<|user|>hello\n"
    )


@pytest.mark.parametrize(
    ("prompt", "code", "param", "words"),
    [
        (
            ChatPrompt(messages=({"role": "assistant", "content": "x"},)),
            "invalid_request",
            "messages",
            "first message",
        ),
        (ChatPrompt(messages=({"role": "user", "content": None},)), "invalid_request", "messages", "template"),
        (ChatPrompt(messages=({"role": "user", "content": "\ud800"},)), "invalid_request", "messages", "U+D800"),
        (TextPrompt(text="ab\udfff"), "invalid_request", "prompt", "U+DFFF at character 2"),
        (TextPrompt(text=""), "invalid_request", "prompt", "no tokens"),
        (TokenPrompt(token_ids=(1, 100_000)), "invalid_request", "prompt", "100000 is not in the vocabulary"),
        (TokenPrompt(token_ids=()), "invalid_request", "prompt", "no tokens"),
    ],
)
def test_prompts_that_cannot_become_tokens(prompt, code, param, words):
    with pytest.raises(RequestRefused) as caught:
        TEXT.encode(prompt, request_id="r", context_tokens=64)
    assert (caught.value.refused.code, caught.value.refused.param) == (code, param)
    assert words in caught.value.refused.message


def test_a_model_without_a_chat_template_says_what_to_use_instead():
    plain = TextTokenizer(byte_level_tokenizer(chat_template=None), ())
    with pytest.raises(RequestRefused, match="/v1/completions") as caught:
        plain.encode(ChatPrompt(messages=({"role": "user", "content": "x"},)), request_id="r", context_tokens=64)
    assert caught.value.refused.code == "unsupported"


def test_a_tokenizer_without_the_fast_backend_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        TextTokenizer(object(), ())


def test_detokenize_refuses_ids_outside_the_vocabulary():
    assert TEXT.detokenize(Detokenize(request_id="r", token_ids=(EOS_ID,))).text == "<|end|>"
    with pytest.raises(RequestRefused, match=f"0 to {TEXT.vocab_size - 1}"):
        TEXT.detokenize(Detokenize(request_id="r", token_ids=(TEXT.vocab_size,)))


def test_a_text_far_beyond_the_context_is_refused_after_its_beginning():
    with pytest.raises(RequestRefused) as caught:
        TEXT.encode(TextPrompt(text="z" * 8_000_000), request_id="r", context_tokens=64)
    refused = caught.value.refused
    assert (refused.code, refused.param) == ("context_length_exceeded", "prompt")
    assert "context is 64 tokens, but the first 512 of 8000000 characters alone have 512" in refused.message


def test_a_long_text_of_long_tokens_is_not_refused_for_its_length():
    token_ids = TEXT.encode(TextPrompt(text="<|tag \u4e16|>" * 100), request_id="r", context_tokens=100)
    assert len(token_ids) == 100


def test_tokenize_spells_every_token():
    answer = TEXT.tokenize(Tokenize(request_id="r", prompt=TextPrompt(text="hello world")), 64)
    assert (answer.token_texts, answer.context_tokens) == (("hello", " world"), 64)


@pytest.mark.parametrize(
    ("files", "tokenizer_eos", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [7, 9]}, "config.json": {"eos_token_id": 3}}, 5, (7, 9)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 3}}, 5, (3,)),
        ({"config.json": {"text_config": {"eos_token_id": 0}}}, 5, (0,)),
        ({"config.json": {"eos_token_id": None}}, 5, (5,)),
        ({}, None, ()),
    ],
)
def test_end_tokens_have_the_precedence_of_generate(tmp_path, files, tokenizer_eos, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read_eos_token_ids(tmp_path, tokenizer_eos) == expected


@pytest.mark.parametrize("nested", [False, True])
def test_ids_that_the_model_cannot_read_are_refused_however_they_come(tmp_path, nested):
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tag_id = len(tokenizer) - 1
    size = {"vocab_size": tag_id}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": size} if nested else size))
    loaded = TextTokenizer.load(tmp_path)
    assert loaded.vocab_size == tag_id
    for prompt in (TokenPrompt(token_ids=(5, tag_id)), TextPrompt(text="a <|tag \u4e16|>")):
        with pytest.raises(RequestRefused, match=f"token id {tag_id} is not in the vocabulary"):
            loaded.encode(prompt, request_id="r", context_tokens=64)


def test_a_saved_tokenizer_loads_and_is_never_truncated(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 1}))
    loaded = TextTokenizer.load(tmp_path)
    assert loaded.eos_token_ids == (1,)
    assert len(loaded.encode(TextPrompt(text="z" * 100), request_id="r", context_tokens=64)) == 100


def stop_reference(text, stops, include_stop):
    """Grow the text character by character; the first stop string that is complete wins, the longest if several."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include_stop else end - len(stop)], stop
    return text, None


@settings(max_examples=150)
@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.booleans(),
    st.lists(st.integers(0, 20), max_size=6),
)
def test_stop_strings_are_found_however_the_text_is_cut(text, stops, include_stop, cuts):
    expected_text, expected_stop = stop_reference(text, stops, include_stop)
    checker = StopChecker(stops, include_stop=include_stop)
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    shown, hit = "", None
    for start, stop in itertools.pairwise(borders):
        piece, hit = checker.feed(text[start:stop])
        shown += piece
        if hit is not None:
            break
        held = len(text[:stop]) - len(shown)
        assert held == max((n for s in stops for n in range(1, len(s)) if text[:stop].endswith(s[:n])), default=0), (
            "holds back exactly the longest end that could begin a stop string"
        )
    if hit is None:
        shown += checker.flush()
    assert (shown, hit) == (expected_text, expected_stop)


def test_disarmed_text_passes_and_begins_no_stop():
    checker = StopChecker(["ab"])
    assert checker.feed("xab a", armed=False) == ("xab a", None)
    assert checker.feed("b ab") == ("b ", "ab")
