import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.replica.blocks import BlockAccountingError, BlockPool


def digests_of(pool, token_ids):
    digests: list[bytes] = []
    pool.extend_digests(digests, token_ids, len(token_ids) // pool.block_tokens)
    return digests


def fill(pool, token_ids):
    """Take blocks for ``token_ids`` and register the full ones, as a prompt does."""
    table = pool.allocate(pool.num_needed(len(token_ids)))
    for block, digest in zip(table, digests_of(pool, token_ids), strict=False):
        pool.register(block, digest)
    return table


def test_nothing_is_shared_between_adapters():
    pool = BlockPool(8, 2)
    table = fill(pool, [1, 2, 3, 4])
    pool.free(table)
    own: list[bytes] = []
    for adapter, found in (("a", ()), ("b", ()), (None, table)):
        own.clear()
        pool.extend_digests(own, [1, 2, 3, 4], 2, adapter)
        assert pool.match_prefix(own) == found


def test_blocks_are_handed_out_once_and_refused_without_change_when_short():
    pool = BlockPool(4, 2)
    first = pool.allocate(3)
    assert len(set(first)) == 3
    assert pool.allocate(2) is None
    assert pool.num_available == 1
    pool.check_integrity([first])


def test_a_freed_prefix_is_found_again_up_to_the_first_difference():
    pool = BlockPool(8, 2)
    table = fill(pool, [1, 2, 3, 4, 5, 6])
    pool.free(table)
    assert pool.match_prefix(digests_of(pool, [1, 2, 3, 4, 9, 6])) == table[:2]
    assert pool.match_prefix(digests_of(pool, [9, 2, 3, 4])) == ()
    pool.check_integrity([])


def test_equal_blocks_after_different_beginnings_are_different():
    pool = BlockPool(8, 2)
    fill(pool, [1, 2, 7, 7])
    assert pool.match_prefix(digests_of(pool, [3, 4, 7, 7])) == ()


def test_the_least_recently_freed_prefix_is_evicted_first_and_tails_before_heads():
    pool = BlockPool(4, 1)
    old, new = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.free(old)
    pool.free(new)
    taken = pool.allocate(1)
    assert taken == (old[1],)
    assert pool.match_prefix(digests_of(pool, [1, 2])) == old[:1]
    assert pool.match_prefix(digests_of(pool, [3, 4])) == new
    pool.check_integrity([taken])


def test_sharing_counts_references_and_cached_blocks_count_as_available_only_while_unused():
    pool = BlockPool(3, 1)
    table = fill(pool, [1, 2])
    matched = pool.match_prefix(digests_of(pool, [1, 2]))
    assert pool.can_take(matched, 1)
    assert not pool.can_take(matched, 2)
    pool.free(table)
    assert pool.num_available == 3
    assert not pool.can_take(matched, 2), "two of the three available blocks are the matched ones themselves"
    pool.acquire(matched)
    pool.acquire(matched)
    pool.check_integrity([matched, matched])
    pool.free(matched)
    assert pool.num_used == 2


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(4, 2, prefix_caching=False)
    pool.free(fill(pool, [1, 2]))
    assert pool.match_prefix(digests_of(pool, [1, 2])) == ()


def test_reset_forgets_everything():
    pool = BlockPool(4, 2)
    fill(pool, [1, 2, 3, 4])
    pool.reset()
    pool.check_integrity([])
    assert pool.match_prefix(digests_of(pool, [1, 2])) == ()
    assert pool.num_available == 4


def test_misuse_is_noticed():
    pool = BlockPool(4, 2)
    table = pool.allocate(2)
    with pytest.raises(BlockAccountingError, match="differ from the tables"):
        pool.check_integrity([])
    with pytest.raises(BlockAccountingError, match="names a block twice"):
        pool.check_integrity([(table[0], table[0])])
    pool.free(table)
    with pytest.raises(BlockAccountingError, match="more often than it was taken"):
        pool.free(table)
    with pytest.raises(ValueError, match="is empty"):
        BlockPool(0, 2)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 3))
def test_any_order_of_operations_keeps_the_accounts(seed, num_blocks, block_tokens):
    rng = random.Random(seed)
    pool = BlockPool(num_blocks, block_tokens)
    tables = []
    for _ in range(60):
        if tables and rng.random() < 0.45:
            pool.free(tables.pop(rng.randrange(len(tables))))
        else:
            token_ids = [rng.randrange(2) for _ in range(rng.randrange(1, 4 * block_tokens + 1))]
            digests = digests_of(pool, token_ids)
            matched = pool.match_prefix(digests)
            num_new = pool.num_needed(len(token_ids)) - len(matched)
            if pool.can_take(matched, num_new):
                pool.acquire(matched)
                new = pool.allocate(num_new)
                assert new is not None
                tables.append(matched + new)
                for block, digest in zip(tables[-1], digests, strict=False):
                    pool.register(block, digest)
        pool.check_integrity(tables)
    for table in tables:
        pool.free(table)
    pool.check_integrity([])
