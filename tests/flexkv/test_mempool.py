from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flexkv.cache.mempool import Mempool
from flexkv.errors import CacheStateError


class MempoolMachine(RuleBasedStateMachine):
    """A pool behaves as a set of free block ids."""

    @initialize(num_blocks=st.sampled_from([1, 7, 64, 65, 130]))
    def make(self, num_blocks: int) -> None:
        self.pool = Mempool(num_blocks)
        self.all = set(range(num_blocks))
        self.used: set[int] = set()

    @rule(count=st.integers(0, 140))
    def allocate(self, count: int) -> None:
        if count > len(self.all - self.used):
            with pytest.raises(CacheStateError, match="are free"):
                self.pool.allocate(count)
            return
        taken = self.pool.allocate(count)
        assert taken.dtype == np.int64
        assert len(set(taken.tolist())) == count
        assert self.used.isdisjoint(taken.tolist())
        self.used |= set(taken.tolist())

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def recycle(self, data: st.DataObject) -> None:
        back = data.draw(st.lists(st.sampled_from(sorted(self.used)), unique=True))
        self.pool.recycle(np.array(back, np.int64))
        self.used -= set(back)

    @rule(data=st.data())
    def recycling_a_bad_block_changes_nothing(self, data: st.DataObject) -> None:
        bad = data.draw(st.sampled_from(sorted((self.all - self.used) | {-1, len(self.all)})))
        good = data.draw(st.lists(st.sampled_from(sorted(self.used)), unique=True)) if self.used else []
        where = data.draw(st.integers(0, len(good)))
        with pytest.raises(CacheStateError, match=f"cannot free block {bad}:"):
            self.pool.recycle(np.array([*good[:where], bad, *good[where:]]))

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def freeing_twice_in_one_call_changes_nothing(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.used)))
        with pytest.raises(CacheStateError, match="free already"):
            self.pool.recycle(np.array([block_id, block_id]))

    @invariant()
    def agrees_with_the_set(self) -> None:
        assert self.pool.num_free == len(self.all) - len(self.used)
        assert self.pool.num_blocks == len(self.all)
        assert {block_id for block_id in self.all if not self.pool.is_free(block_id)} == self.used


MempoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMempool = MempoolMachine.TestCase


def test_an_absurd_count_is_refused_without_taking_memory() -> None:
    with pytest.raises(CacheStateError, match="of 10 are free"):
        Mempool(10).allocate(2**50)


def test_fresh_blocks_are_neighbours() -> None:
    pool = Mempool(1000)
    assert pool.allocate(100).tolist() == list(range(100))
    assert pool.allocate(100).tolist() == list(range(100, 200))
