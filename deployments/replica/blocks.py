"""KV block accounting: token counts and digests enter, block ids leave; no tensors here.

Every block is in exactly one place::

    free      nobody uses it, nothing worth keeping in it
    cached    nobody uses it, but it holds a full block that the prefix cache can hand out; evicted oldest first
    used      one or more sequences hold it (reference count)

A full block is known by a digest of its tokens and of the digest before it (BLAKE2b, 256 bits), so equal digests
mean equal tokens at equal positions, computed by the same adapter.

A block may be freed while a step that uses it is still in flight, and handed out again at once: every stage runs
steps strictly in the order they were sent, so the step that reuses the block writes after the older one has read.
For the same reason a block counts as filled once the step that fills it has been *planned*, for use by later steps.
Within one step nothing is shared: the caller registers a step's blocks after the whole step has been planned.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence

DIGEST_BYTES = 32


class BlockAccountingError(AssertionError):
    """The pool contradicts itself or its users: a bug in this package."""


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a full block, given the digest of the block before it."""
    packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return hashlib.blake2b(parent + packed, digest_size=DIGEST_BYTES).digest()


def _root(adapter: str | None) -> bytes:
    return hashlib.blake2b((adapter or "").encode(), digest_size=DIGEST_BYTES).digest()


class BlockPool:
    """A fixed number of KV blocks, shared by reference count and found again by digest."""

    def __init__(self, num_blocks: int, block_tokens: int, *, prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_tokens} tokens is empty; both must be >= 1")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._by_digest: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that ``allocate`` can hand out: free ones, and cached ones at the price of forgetting them."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_blocks - self.num_available

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` positions take."""
        return -(-num_tokens // self.block_tokens)

    def extend_digests(
        self, digests: list[bytes], token_ids: Sequence[int], num_blocks: int, adapter: str | None = None
    ) -> None:
        """Grow ``digests`` in place until it covers the first ``num_blocks`` full blocks of ``token_ids``.

        The chain begins with the ``adapter`` that computes them, so that nothing is shared between two.
        """
        size = self.block_tokens
        for index in range(len(digests), num_blocks):
            parent = digests[index - 1] if index else _root(adapter)
            digests.append(block_digest(parent, token_ids[index * size : (index + 1) * size]))

    def match_prefix(self, digests: Sequence[bytes]) -> tuple[int, ...]:
        """The blocks of the longest known prefix of ``digests``; takes no reference."""
        blocks = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            blocks.append(block)
        return tuple(blocks)

    def can_take(self, matched: Sequence[int], num_new: int) -> bool:
        """Whether ``acquire(matched)`` and then ``allocate(num_new)`` would succeed."""
        num_from_cache = sum(1 for block in matched if self._references[block] == 0)
        return num_new + num_from_cache <= self.num_available

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Take one more reference to each block that ``match_prefix`` found."""
        for block in block_ids:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def allocate(self, num_new: int) -> tuple[int, ...] | None:
        """``num_new`` blocks of unknown content, one reference each; None (and no change) when they are short."""
        if num_new > self.num_available:
            return None
        blocks = tuple(self._take_one() for _ in range(num_new))
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _take_one(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._by_digest[digest]
            self._digests[block] = None

    def register(self, block: int, digest: bytes) -> None:
        """Offer a full block to the prefix cache; the first block with a digest keeps it."""
        if self.prefix_caching and self._digests[block] is None and digest not in self._by_digest:
            self._digests[block] = digest
            self._by_digest[digest] = block

    def free(self, block_ids: Sequence[int]) -> None:
        """Give back one reference to each block of a table; its tail will be evicted before its head."""
        for block in reversed(block_ids):
            self._references[block] -= 1
            if self._references[block] < 0:
                raise BlockAccountingError(f"block {block} was freed more often than it was taken; this is a bug")
            if self._references[block] == 0:
                if self._digests[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def reset(self) -> None:
        """The stages lost their caches: every block is free and nothing is known about any of them."""
        self._references = [0] * self.num_blocks
        self._digests = [None] * self.num_blocks
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._cached.clear()
        self._by_digest.clear()

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare the pool with the block tables of all its users; raises BlockAccountingError.

        O(blocks): for tests. ``tables`` must name every table in use.
        """
        expected = [0] * self.num_blocks
        for table in tables:
            if len(set(table)) != len(table):
                raise BlockAccountingError(f"a table names a block twice: {list(table)}")
            for block in table:
                expected[block] += 1
        wrong = [b for b in range(self.num_blocks) if expected[b] != self._references[b]]
        if wrong:
            pairs = ", ".join(f"{b}: {self._references[b]} counted, {expected[b]} held" for b in wrong[:8])
            raise BlockAccountingError(f"reference counts differ from the tables: {pairs}")
        self._check_places()

    def _check_places(self) -> None:
        idle = sorted([*self._free, *self._cached])
        if idle != [b for b in range(self.num_blocks) if self._references[b] == 0]:
            raise BlockAccountingError("free, cached and used blocks do not add up to the pool")
        known = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        if known != self._by_digest:
            raise BlockAccountingError("the digest index differs from the blocks' own digests")
        if not all(self._digests[b] is None for b in self._free):
            raise BlockAccountingError("a free block has a digest")
        if not all(self._digests[b] is not None for b in self._cached):
            raise BlockAccountingError("a cached block has no digest")
