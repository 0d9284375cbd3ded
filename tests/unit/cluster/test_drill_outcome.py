"""What a drill makes of single responses and of many outcomes, without any network."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.control.drill.asks import KINDS, Ask, make_asks, short_ask
from cluster.control.drill.judge import (
    Hit,
    changed,
    describe_difference,
    nothing_changed,
    nothing_failed,
    one_end_each,
    pause,
)
from cluster.control.drill.outcome import Outcome, ResponseReader
from cluster.control.drill.rates import answered_per_second, overload_promises

ASK = Ask(kind="seeded", path="/v1/completions", body={"stream": True}, num_tokens=2)
HIT = Hit(what="kill", at=10.0, until=10.0)


def outcome(ask: Ask = ASK, **seen: object) -> Outcome:
    return Outcome(**({"ask": ask, "number": 0, "sent_at": 0.0} | seen))  # type: ignore[arg-type]


def done(*token_times: float, text: str = "ab", sent_at: float = 0.0, number: int = 0) -> Outcome:
    return outcome(
        number=number,
        sent_at=sent_at,
        token_times=list(token_times),
        texts=[text],
        finish_reasons=["length"],
        logprob_tokens=[[]],
        num_tokens=len(text),
        end="done",
        ended_at=token_times[-1] if token_times else sent_at,
    )


def piece(text: str, finish_reason: str | None = None, index: int = 0) -> str:
    return json.dumps({"choices": [{"index": index, "text": text, "finish_reason": finish_reason}]})


USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": 2}})


def read(*events: str, ask: Ask = ASK) -> Outcome:
    seen = outcome(ask)
    reader = ResponseReader(seen)
    for at, event in enumerate(events, 1):
        reader.line(f"data: {event}\n".encode(), float(at))
    return seen


def test_a_good_stream_has_text_times_count_and_one_end() -> None:
    seen = read(piece("a"), piece("b"), piece("", "length"), USAGE, "[DONE]")
    assert (seen.texts, seen.token_times, seen.num_tokens) == (["ab"], [1.0, 2.0], 2)
    assert (seen.end, seen.ended_at, seen.violations) == ("done", 5.0, [])


def test_comments_and_blank_lines_are_no_tokens() -> None:
    seen = outcome()
    reader = ResponseReader(seen)
    for line in (b": waiting\n", b"\n", b"event: error\n"):
        reader.line(line, 1.0)
    assert (seen.token_times, seen.end) == ([], None)


@pytest.mark.parametrize(
    ("events", "violation"),
    [
        ((piece("ab", "stop"), USAGE, "[DONE]", "[DONE]"), "a second end"),
        ((piece("ab", "stop"), USAGE, "[DONE]", piece("c")), "an event after the end"),
        ((piece("ab", "stop"), piece("c"), USAGE, "[DONE]"), "goes on after its end"),
        ((piece("ab"), USAGE, "[DONE]"), "no finish reason"),
        ((piece("ab", "stop"), "[DONE]"), "counted None tokens"),
        ((piece("ab", "stop"), USAGE.replace("2", "3"), "[DONE]"), "counted 3 tokens, 2 were asked for"),
        (("{", piece("ab", "stop"), USAGE, "[DONE]"), "cannot be read"),
        ((piece("a", index=4), piece("ab", "stop"), USAGE, "[DONE]"), "cannot be read"),
        (('{"error": {"message": "lost"}}', "[DONE]"), "a second end (done) after error"),
    ],
)
def test_what_no_server_may_send_is_a_violation(events: tuple[str, ...], violation: str) -> None:
    seen = read(*events)
    assert any(violation in found for found in seen.violations), seen.violations
    assert not one_end_each([seen]).kept


def test_an_error_event_is_an_explicit_end() -> None:
    seen = read(piece("a"), '{"error": {"message": "stage 1 is lost"}}')
    assert (seen.end, seen.error) == ("error", "stage 1 is lost")
    assert one_end_each([seen]).kept
    assert not nothing_failed([seen]).kept
    assert "stage 1 is lost" in nothing_failed([seen]).detail


def test_every_logprob_is_a_token_that_was_counted() -> None:
    ask = Ask(kind="logprobs", path="/v1/completions", body={"stream": True, "logprobs": 2}, num_tokens=2)
    whole = {"choices": [{"index": 0, "text": "ab", "logprobs": {"tokens": ["a", "b"]}, "finish_reason": "stop"}]}
    assert read(json.dumps(whole), USAGE, "[DONE]", ask=ask).violations == []
    whole["choices"][0]["logprobs"] = {"tokens": ["a"]}  # type: ignore[index]
    assert read(json.dumps(whole), USAGE, "[DONE]", ask=ask).violations == ["1 tokens came, the server counted 2"]


def test_a_refusal_keeps_its_status_reason_and_time_to_come_back() -> None:
    seen = outcome()
    ResponseReader(seen).refused(429, b'{"error": {"message": "full"}}', "3", 1.0)
    assert (seen.end, seen.status, seen.error, seen.retry_after_s) == ("refused", 429, "429: full", 3.0)


def test_no_request_at_all_is_not_a_kept_promise() -> None:
    assert not nothing_failed([]).kept


def test_a_request_without_an_end_is_told() -> None:
    assert not one_end_each([outcome()]).kept
    assert not one_end_each([outcome(end="broken", error="reset")]).kept
    assert "reset" in one_end_each([outcome(end="broken", error="reset")]).detail


@given(text=st.text(min_size=4, max_size=30), data=st.data())
def test_the_difference_says_lost_or_repeated(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    lost, repeated = text[:start] + text[stop:], text[:stop] + text[start:stop] + text[stop:]
    golden = {0: done(text=text)}
    for got, word in ((lost, "lost"), (repeated, "repeats")):
        assert word in describe_difference(golden[0], done(text=got))
        assert not nothing_changed([done(text=got)], golden).kept
    assert nothing_changed([done(text=text)], golden).kept


def test_answers_are_compared_with_those_of_the_same_ask_only() -> None:
    golden = {0: done(text="ab"), 1: done(text="cd", number=1)}
    assert changed([done(text="cd", number=1), done(text="ab")], golden) == []
    assert len(changed([done(text="ab", number=1)], golden)) == 1


def test_the_pause_is_the_silence_around_the_hit() -> None:
    steady = [done(9.0, 9.5, 10.2, 17.0, 17.5), done(9.8, 18.0)]
    found = pause([*steady, done(30.0, 60.0, sent_at=20.0)], [HIT])
    assert found is not None
    assert found.max_s == pytest.approx(8.2)
    assert found.p50_s == pytest.approx((6.8 + 8.2) / 2)
    assert found.recover_s == pytest.approx(8.0)


def test_waiting_for_the_first_token_is_a_silence_too_and_slow_moments_elsewhere_are_not() -> None:
    waiting = done(25.0, sent_at=9.0)
    slow_later = done(9.9, 10.5, 11.2, 13.2, 40.0)
    found = pause([waiting, slow_later], [HIT])
    assert found is not None
    assert found.max_s == pytest.approx(16.0)
    assert found.p50_s == pytest.approx((16.0 + 0.7) / 2)
    assert pause([done(1.0, 2.0)], [HIT]) is None


def test_a_change_that_takes_time_is_hit_all_the_while() -> None:
    found = pause([done(9.0, 11.0, 14.0, 14.5)], [Hit(what="update", at=10.0, until=13.0)])
    assert found is not None
    assert found.max_s == pytest.approx(3.0)


def test_only_answers_to_the_end_are_goodput() -> None:
    good = done(1.0, 2.0, 3.0, 9.0, text="abcd")
    cut = outcome(token_times=[1.0, 2.0], num_tokens=2, end="error", ended_at=3.0)
    assert answered_per_second([good, cut], 0.5, 4.5) == pytest.approx(3 / 4)


def refusal(seconds: float, retry_after_s: float | None = 1.0, status: int = 429) -> Outcome:
    return outcome(status=status, end="refused", ended_at=seconds, retry_after_s=retry_after_s, error="full")


@pytest.mark.parametrize(
    ("outcomes", "broken"),
    [
        ([done(1.0), refusal(0.02)], []),
        ([done(1.0), refusal(0.15)], ["refusals take under 100 ms (p99)"]),
        ([refusal(0.02, retry_after_s=None)], ["refusals carry Retry-After"]),
        ([refusal(0.02, retry_after_s=0.0)], ["refusals carry Retry-After"]),
        ([done(1.0)], ["what is too much is refused"]),
        ([refusal(0.02), refusal(0.02, status=500)], ["every request is answered or refused with 429"]),
        ([refusal(0.02), outcome(end="unended", ended_at=9.0)], ["every request is answered or refused with 429"]),
    ],
)
def test_an_overload_is_judged_by_its_refusals(outcomes: list[Outcome], broken: list[str]) -> None:
    assert [promise.text for promise in overload_promises(outcomes) if not promise.kept] == broken


@pytest.mark.parametrize("context_tokens", [8, 64, 256, 4096])
def test_asks_fit_the_context_even_where_a_character_is_a_token(context_tokens: int) -> None:
    asks = make_asks("m", context_tokens, 24, seed=3)
    assert {ask.kind for ask in asks} == set(KINDS)
    for ask in asks:
        prompt = ask.body.get("prompt") or ask.body["messages"][0]["content"]
        assert len(prompt) + ask.body["max_tokens"] <= context_tokens // 2
        assert ask.num_tokens in (None, ask.body["max_tokens"] * ask.num_choices)
    assert asks == make_asks("m", context_tokens, 24, seed=3)
    assert len({json.dumps(ask.body) for ask in asks}) == 24
    assert short_ask("m", 3, 16).num_tokens == 16
