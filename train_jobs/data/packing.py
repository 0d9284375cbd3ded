"""Pieces of documents enter one by one, full sequences of whole pieces leave: best fit over a bounded set of bins.

A piece goes into the open bin that it fills best (Johnson et al., "Worst-case performance bounds for simple
one-dimensional packing algorithms", 1974). What leaves depends on the order of the pieces only.
"""

from bisect import bisect_left, insort

from train_jobs.data.shard_writer import Piece

MAX_OPEN_BINS = 1024
_MIN_PIECE_TOKENS = 2
"""A piece has a token to predict and one before it."""


class Packer:
    """Bins of ``sequence_tokens`` tokens that are being filled."""

    def __init__(self, sequence_tokens: int, *, max_open_bins: int = MAX_OPEN_BINS) -> None:
        self._sequence_tokens = sequence_tokens
        self._max_open_bins = max_open_bins
        self._free: list[tuple[int, int]] = []
        """(free tokens, number of the bin), sorted."""
        self._bins: dict[int, list[Piece]] = {}
        self._next_number = 0

    def add(self, piece: Piece) -> list[list[Piece]]:
        """Put ``piece`` into a bin; the bins that are complete now, none or one."""
        size = len(piece)
        assert size <= self._sequence_tokens, "pieces are cut to fit a sequence; this is a bug"
        at = bisect_left(self._free, (size, -1))
        if at < len(self._free):
            free, number = self._free.pop(at)
        else:
            free, number = self._sequence_tokens, self._next_number
            self._bins[number] = []
            self._next_number += 1
        self._bins[number].append(piece)
        if free - size < _MIN_PIECE_TOKENS:
            return [self._bins.pop(number)]
        insort(self._free, (free - size, number))
        if len(self._free) > self._max_open_bins:
            return [self._bins.pop(self._free.pop(0)[1])]
        return []

    def flush(self) -> list[list[Piece]]:
        """All bins that are still open, oldest first."""
        rest = [self._bins[number] for number in sorted(self._bins)]
        self._bins, self._free = {}, []
        return rest
