"""A seed and a global cursor enter, the number of the item to train on leaves; nothing is kept in between.

Epoch ``cursor // num_items`` visits every item once, in an order of its own. The order is a keyed permutation that is
computed, not stored: a Feistel network over the smallest even number of bits that holds ``num_items``, applied again
while the result is too large (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 8
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
"""Multipliers of splitmix64's finalizer (Steele, Lea and Flood, "Fast splittable pseudorandom number generators")."""


@dataclass(frozen=True, slots=True)
class Order:
    """The order in which ``num_items`` items are visited, epoch after epoch, under ``seed``.

    A function of (num_items, seed, cursor) and of nothing else, so it is the same at any number of workers.
    ValueError when ``num_items`` is not positive.
    """

    num_items: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_items < 1:
            raise ValueError(f"num_items is {self.num_items}; an order needs at least one item")

    def at(self, cursor: int) -> int:
        """The item at position ``cursor``, counted from 0 over all epochs."""
        return int(self.batch(cursor, 1)[0])

    def batch(self, cursor: int, count: int) -> NDArray[np.int64]:
        """The items at positions ``cursor`` to ``cursor + count - 1``; the range may span several epochs."""
        if cursor < 0 or count < 0:
            raise ValueError(f"cursor {cursor} and count {count} must not be negative")
        parts, stop = [np.empty(0, dtype=np.int64)], cursor + count
        while cursor < stop:
            epoch, start = divmod(cursor, self.num_items)
            length = min(stop - cursor, self.num_items - start)
            positions = np.arange(start, start + length, dtype=np.uint64)
            parts.append(_permute(positions, self.num_items, _round_keys(self.seed, epoch)))
            cursor += length
        return np.concatenate(parts)


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    text = f"manta order {seed} {epoch}".encode()
    digest = hashlib.blake2b(text, digest_size=8 * _NUM_ROUNDS).digest()
    return np.array(struct.unpack(f"<{_NUM_ROUNDS}Q", digest), dtype=np.uint64)


def _permute(positions: NDArray[np.uint64], num_items: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    half_bits = max(1, ((num_items - 1).bit_length() + 1) // 2)
    items = _feistel(positions, half_bits, keys)
    outside = np.flatnonzero(items >= num_items)
    while outside.size:
        items[outside] = _feistel(items[outside], half_bits, keys)
        outside = outside[items[outside] >= num_items]
    return items.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * _MIX_A
    values = (values ^ (values >> np.uint64(27))) * _MIX_B
    return values ^ (values >> np.uint64(31))
