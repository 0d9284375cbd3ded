"""What an overload proves: outcomes of too many requests in, goodput and how the refusals were made out."""

from collections.abc import Sequence

from cluster.control.drill.judge import Promise, describe_failure
from cluster.control.drill.outcome import Outcome

_REFUSAL_LIMIT_S = 0.1
_QUANTILE = 0.99
_TOO_MANY = 429


def answered_per_second(outcomes: Sequence[Outcome], begin: float, stop: float) -> float:
    """Tokens per second that arrived in the window and belong to requests that were answered to the end.

    Counted by events; a stream's tokens that came in one event are spread over its events evenly.
    """
    total = 0.0
    for outcome in outcomes:
        if outcome.end == "done" and outcome.token_times and outcome.num_tokens:
            inside = sum(begin <= at < stop for at in outcome.token_times)
            total += outcome.num_tokens * inside / len(outcome.token_times)
    return total / (stop - begin)


def overload_promises(outcomes: Sequence[Outcome]) -> list[Promise]:
    """Every request ended as an answer or as a 429; refusals were fast and said when to come back."""
    refused = [outcome for outcome in outcomes if outcome.status == _TOO_MANY and outcome.end == "refused"]
    lost = [each for each in outcomes if (each.end != "done" and each.status != _TOO_MANY) or each.violations]
    examples = "; ".join(dict.fromkeys(map(describe_failure, lost[:3])))
    return [
        Promise(
            text="every request is answered or refused with 429",
            kept=not lost,
            detail=f"{len(outcomes) - len(refused) - len(lost)} answered, {len(refused)} refused, {len(lost)} lost"
            + (f": {examples}" if lost else ""),
            shown=True,
        ),
        *_refusal_promises(refused),
    ]


def _refusal_promises(refused: Sequence[Outcome]) -> list[Promise]:
    if not refused:
        return [Promise(text="what is too much is refused", kept=False, detail="nothing was refused at 3x capacity")]
    took = sorted(outcome.ended_at - outcome.sent_at for outcome in refused if outcome.ended_at is not None)
    slowest = took[min(len(took) - 1, int(_QUANTILE * len(took)))]
    without = sum(outcome.retry_after_s is None or outcome.retry_after_s < 1 for outcome in refused)
    detail = f"p50 {_ms(took[len(took) // 2])}, p99 {_ms(slowest)}, longest {_ms(took[-1])}"
    return [
        Promise(text="refusals take under 100 ms (p99)", kept=slowest < _REFUSAL_LIMIT_S, detail=detail, shown=True),
        Promise(text="refusals carry Retry-After", kept=not without, detail=f"{without} of {len(refused)} did not"),
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"
