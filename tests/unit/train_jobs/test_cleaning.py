"""Rows become examples: cleaned, checked, or refused with the reason."""

from dataclasses import replace
from typing import Any

import pytest

from cluster.config.jobs_train import JobTask
from tests.support.corpora import CLEAN
from train_jobs.data.cleaning import Example, Malformed, Message, clean_text, make_example


def test_line_ends_unicode_and_white_space_are_unified() -> None:
    assert clean_text("  a\r\nb\rc e\u0301 \n", CLEAN) == "a\nb\nc \u00e9"
    assert clean_text("\ufb01n", CLEAN) == "\ufb01n"
    assert clean_text("\ufb01n", replace(CLEAN, normalize="NFKC")) == "fin"
    assert clean_text("e\u0301", replace(CLEAN, normalize=None)) == "e\u0301"


def test_labels_are_text() -> None:
    example = make_example("classify", {"text": "a", "label": 3}, CLEAN, None)
    assert example == Example(text="a", label="3")


def test_conversations_may_name_their_turns_otherwise() -> None:
    turns = [{"from": "human", "value": "hi "}, {"from": "gpt", "value": "hello"}]
    example = make_example("sft", {"messages": turns}, CLEAN, None)
    assert example.messages == (Message(role="user", content="hi"), Message(role="assistant", content="hello"))


def test_an_answer_may_be_the_end_of_a_conversation() -> None:
    talk = [{"role": "user", "content": "q"}]
    values = {"prompt": "q", "chosen": [*talk, {"role": "assistant", "content": "good"}], "rejected": "bad"}
    example = make_example("dpo", values, CLEAN, None)
    assert (example.messages[0].content, example.chosen, example.rejected) == ("q", "good", "bad")


@pytest.mark.parametrize(
    ("task", "values", "reason"),
    [
        ("lm", {"text": 5}, "text is int, not text"),
        ("lm", {"text": "a \ud800"}, r"lone surrogate U\+D800"),
        ("classify", {"text": "a", "label": ""}, "label is '', not text or a whole number"),
        ("classify", {"text": "a", "label": 0.5}, "label is 0.5"),
        ("classify", {"text": "a", "label": "z"}, "label 'z' is not one of x, y"),
        ("sft", {"messages": "hi"}, "messages is str, not a list"),
        ("sft", {"messages": []}, "not a list of messages"),
        ("sft", {"messages": [{"role": "user", "content": "hi"}]}, "no turn of the assistant"),
        ("sft", {"messages": [{"role": "robot", "content": "hi"}]}, "role 'robot' is none of"),
        ("sft", {"messages": [{"role": "user"}]}, "a message has no `content`"),
        ("sft", {"messages": ["hi"]}, "a message needs `role` and `content`, not hi"),
        ("dpo", {"prompt": "q", "chosen": "a", "rejected": "a "}, "chosen and rejected are the same"),
        (
            "dpo",
            {"prompt": "q", "chosen": [{"role": "user", "content": "q"}], "rejected": "a"},
            "not the assistant's",
        ),
    ],
)
def test_rows_that_cannot_be_used_say_why(task: JobTask, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        make_example(task, values, CLEAN, frozenset({"x", "y"}))


def test_what_makes_documents_the_same_and_keeps_them_together() -> None:
    first = Example(messages=(Message(role="user", content="q"), Message(role="assistant", content="a")))
    second = Example(messages=(Message(role="user", content="q"), Message(role="assistant", content="b")))
    assert first.identity != second.identity
    assert first.split_identity == second.split_identity == ("q",)
    assert Example(text="t", label="x").identity == Example(text="t", label="y").identity
