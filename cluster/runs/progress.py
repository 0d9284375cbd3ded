"""How far a run is, as one line of its job's log: written by the job, read again by whoever follows it."""

import re
from dataclasses import dataclass

_LINE = re.compile(
    r"step (?P<step>\d+) of (?P<num_steps>\d+|\?)"
    r"(?:, loss (?P<loss>\S+))?(?:, (?P<tokens_per_s>\d+) tokens/s)?(?:, (?P<left_s>\d+) s left)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A run after ``step`` steps; what is not known is None."""

    step: int
    num_steps: int | None
    loss: float | None = None
    tokens_per_s: float | None = None
    left_s: float | None = None

    def __str__(self) -> str:
        """The line, such as ``step 120 of 300, loss 2.3125, 1200 tokens/s, 95 s left``."""
        text = f"step {self.step} of {'?' if self.num_steps is None else self.num_steps}"
        text += "" if self.loss is None else f", loss {self.loss:.6g}"
        text += "" if self.tokens_per_s is None else f", {self.tokens_per_s:.0f} tokens/s"
        return text + ("" if self.left_s is None else f", {self.left_s:.0f} s left")


def read_progress(line: str) -> Progress | None:
    """The progress that a line of a log tells; None for any other line."""
    match = _LINE.fullmatch(line.strip())
    if match is None:
        return None
    return Progress(
        step=int(match["step"]),
        num_steps=None if match["num_steps"] == "?" else int(match["num_steps"]),
        loss=_number(match["loss"]),
        tokens_per_s=_number(match["tokens_per_s"]),
        left_s=_number(match["left_s"]),
    )


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
