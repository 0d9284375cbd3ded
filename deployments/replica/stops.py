"""Stop strings: text enters in pieces, what may be shown leaves, until a stop string is complete."""

from collections.abc import Sequence


class StopChecker:
    """Looks for stop strings in text that arrives in pieces.

    Of several stop strings the one that is complete first wins, the longest of those; so the outcome depends on the
    text alone, not on how it was cut. Text is held back only while its end could be the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._inner_characters = frozenset("".join(stop[:-1] for stop in stops))
        self._held = ""

    def feed(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """Take more text; returns what may be shown now, and the stop string if one is complete.

        ``armed=False`` passes the text through: nothing in it, nor anything that begins in it, counts as a stop.
        """
        if not self._stops or not armed:
            return text, None
        text = self._held + text
        self._held = ""
        hits = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if hits:
            end, start, stop = min(hits)
            return text[: end if self._include_stop else start], stop
        cut = len(text) - self._num_pending(text)
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """The text held back, once no more can come."""
        held, self._held = self._held, ""
        return held

    def _num_pending(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        if not text or text[-1] not in self._inner_characters:
            return 0
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
