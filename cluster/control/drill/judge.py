"""What outcomes prove: requests and the undisturbed answers in, promises that were kept or broken and numbers out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from cluster.control.drill.outcome import Outcome

_IN_THE_PIPE_S = 1.0
"""A token that arrives so shortly after a kill may have been on its way already."""
_EXAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """One thing that must hold; ``detail`` has the numbers, and the first examples where it was broken."""

    text: str
    kept: bool
    detail: str
    shown: bool = False
    """Whether the numbers are of interest also where it was kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """Something was done to the cluster between ``at`` and ``until`` (the same moment for a kill)."""

    what: str
    at: float
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """The longest silence of one stream around a hit: how long, and when it ended. Seconds."""

    seconds: float
    ended_at: float


Golden = Mapping[int, Outcome]
"""The undisturbed outcome of each ask of the pool."""


def failures(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Requests that did not end with an answer."""
    return [outcome for outcome in outcomes if outcome.end != "done"]


def changed(outcomes: Iterable[Outcome], golden: Golden) -> list[Outcome]:
    """Answers that differ from the undisturbed one of the same ask."""
    return [each for each in outcomes if each.end == "done" and each.answer != golden[each.number].answer]


def nothing_failed(outcomes: Sequence[Outcome]) -> Promise:
    """Every request was answered."""
    failed = failures(outcomes)
    detail = f"{len(failed)} of {len(outcomes)} failed{_examples(map(describe_failure, failed))}"
    return Promise(text="every request is answered", kept=not failed and bool(outcomes), detail=detail)


def one_end_each(outcomes: Sequence[Outcome]) -> Promise:
    """Every request ended exactly once, and nothing came that may not come."""
    wrong = [outcome for outcome in outcomes if outcome.end in (None, "unended", "broken") or outcome.violations]
    detail = f"{len(wrong)} of {len(outcomes)} did not{_examples(map(describe_violation, wrong))}"
    return Promise(text="every request has exactly one end", kept=not wrong, detail=detail)


def nothing_changed(outcomes: Sequence[Outcome], golden: Golden) -> Promise:
    """Every answer equals the undisturbed one: no token repeated, lost or changed."""
    different = changed(outcomes, golden)
    examples = _examples(describe_difference(golden[each.number], each) for each in different)
    num_compared = sum(outcome.end == "done" for outcome in outcomes)
    detail = f"{len(different)} of {num_compared} differ{examples}"
    return Promise(text="answers equal the undisturbed ones", kept=not different, detail=detail)


def stalls(outcomes: Iterable[Outcome], hit: Hit) -> list[Stall]:
    """The longest silence around ``hit`` of every stream that was open then and has gone on."""
    found = [_stall(outcome, hit) for outcome in outcomes if outcome.ask.streams and outcome.sent_at <= hit.at]
    return [stall for stall in found if stall is not None]


def _stall(outcome: Outcome, hit: Hit) -> Stall | None:
    moments = [outcome.sent_at, *outcome.token_times]
    silences = [
        Stall(seconds=after - before, ended_at=after)
        for before, after in pairwise(moments)
        if after > hit.at and before <= hit.until + _IN_THE_PIPE_S
    ]
    return max(silences, key=lambda silence: silence.seconds, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """What streams felt of all hits: the median and the longest silence, and until the last one went on. Seconds."""

    p50_s: float
    max_s: float
    recover_s: float


def pause(outcomes: Sequence[Outcome], hits: Iterable[Hit]) -> Pause | None:
    """The pause over all ``hits``; None where no stream was open."""
    found = [(hit, stall) for hit in hits for stall in stalls(outcomes, hit)]
    if not found:
        return None
    seconds = [stall.seconds for _, stall in found]
    recover_s = max(stall.ended_at - hit.at for hit, stall in found)
    return Pause(p50_s=median(seconds), max_s=max(seconds), recover_s=recover_s)


def describe_failure(outcome: Outcome) -> str:
    """A failed request in a few words."""
    return f"{outcome.ask.kind}: {outcome.end or 'no end'}, {outcome.error}"


def describe_violation(outcome: Outcome) -> str:
    """What was wrong with how a request ended."""
    return f"{outcome.ask.kind}: {outcome.violations[0] if outcome.violations else describe_failure(outcome)}"


def describe_difference(expected: Outcome, got: Outcome) -> str:
    """The first difference between two answers to one ask, and whether a piece was lost or came twice."""
    for index, (one, other) in enumerate(zip(expected.texts, got.texts, strict=True)):
        if one != other:
            return f"{got.ask.kind}: choice {index} {_text_difference(one, other)}"
    if expected.num_tokens != got.num_tokens:
        return f"{got.ask.kind}: {got.num_tokens} tokens instead of {expected.num_tokens}"
    return f"{got.ask.kind}: same text, but finish reasons or single tokens differ"


def _text_difference(expected: str, got: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(map(len, (expected, got)))
    )
    at = f"at character {same} of {len(expected)}"
    if got.endswith(expected[same:]) and len(got) > len(expected):
        return f"repeats {got[same : same + len(got) - len(expected)]!r} {at}"
    if expected.endswith(got[same:]) and len(got) < len(expected):
        return f"lost {expected[same : same + len(expected) - len(got)]!r} {at}"
    return f"differs {at}: {got[same : same + 20]!r} instead of {expected[same : same + 20]!r}"


def _examples(texts: Iterable[str]) -> str:
    """The most frequent few of ``texts``, in order of appearance, as the end of a sentence."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return ""
    more = f"; and {len(distinct) - _EXAMPLES} others" if len(distinct) > _EXAMPLES else ""
    return ": " + "; ".join(distinct[:_EXAMPLES]) + more
