"""How far a run is and how long it will take: steps as they are heard of in, seconds out."""


class Pace:
    """Steps per second since an attempt's first one; times are those of any steady clock, seconds."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def heard(self, step: int, now: float) -> None:
        """``step`` steps are done by now."""
        if self._first is None:
            self._first = (step, now)
        if self._last is None or step > self._last[0]:
            self._last = (step, now)

    def remaining_s(self, num_steps: int) -> float | None:
        """Seconds until ``num_steps`` steps are done; None until two steps have been heard of."""
        if self._first is None or self._last is None or self._last[0] == self._first[0]:
            return None
        per_step_s = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
        return max(0.0, (num_steps - self._last[0]) * per_step_s)
