"""How long a step may take before its stages count as stuck: sizes and durations of honest steps in, limits out."""

_FLOOR_S = 10.0
_FACTOR = 20.0


class StepDeadline:
    """Learns from the steps that came back; never stricter than 10 s, never laxer than ``ceiling_s``.

    A step is compared with honest ones of about its size (the same power of two) or larger: twenty times the longest
    of them is the limit. Before there is one, the ceiling holds: a first step may have something to load or compile.
    It also holds for a step of 0 tokens, which is one whose size only the engine behind the stage decides.
    A false alarm costs a new stage process and a pause, never a token, so a loaded machine needs no exact limit.
    """

    def __init__(self, ceiling_s: float) -> None:
        self.ceiling_s = ceiling_s
        self._longest_s: dict[int, float] = {}

    def limit_s(self, num_tokens: int) -> float:
        """How long a step over ``num_tokens`` may take."""
        if num_tokens == 0:
            return self.ceiling_s
        known = [seconds for size, seconds in self._longest_s.items() if size >= num_tokens.bit_length()]
        if not known:
            return self.ceiling_s
        return min(self.ceiling_s, max(_FLOOR_S, _FACTOR * max(known)))

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step over ``num_tokens`` came back after ``seconds``."""
        size = num_tokens.bit_length()
        self._longest_s[size] = max(seconds, self._longest_s.get(size, 0.0))
