"""The progress callback that every long step takes: ``progress(label, done, total, unit)``.

``done`` counts up to ``total`` in ``unit`` (``B`` for bytes); ``total`` is None while it is not known. A step is over
when ``done == total``.
"""

from collections.abc import Callable

Progress = Callable[[str, int, int | None, str], None]


def no_progress(label: str, done: int, total: int | None, unit: str) -> None:
    """Show nothing."""


class ByteCount:
    """Adds up the bytes of one step and reports them under one label."""

    def __init__(self, progress: Progress, label: str, total_bytes: int) -> None:
        self._progress = progress
        self._label = label
        self._total_bytes = total_bytes
        self._done_bytes = 0
        progress(label, 0, total_bytes, "B")

    def add(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more."""
        self._done_bytes += num_bytes
        self._progress(self._label, self._done_bytes, self._total_bytes, "B")
