from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flexkv.cache.radixtree import RadixTree
from flexkv.common.config import EVICTION_POLICIES
from flexkv.errors import CacheStateError, ConfigError

Prefix = tuple[int, ...]
SEQUENCES = st.lists(st.integers(0, 2), max_size=7).map(tuple)


def digests(names: Prefix) -> npt.NDArray[np.uint8]:
    """Digests of the blocks of a sequence: each names its whole prefix."""
    rows = [hashlib.sha256(repr(names[: i + 1]).encode()).digest() for i in range(len(names))]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(names), 32)


@dataclass(eq=False)
class Block:
    """A block of the naive model: every block stands alone, with its own lock count."""

    prefix: Prefix
    block_id: int
    last_use: int
    inserted: int
    num_uses: int = 1
    ready: bool = False
    attached: bool = True
    num_locks: int = 0


@dataclass(eq=False)
class Lock:
    handle: int
    path: list[Block]
    new: list[Block] = field(default_factory=list)
    is_open: bool = False
    """Whether its new blocks are neither ready nor removed."""


LEAVES_FIRST: dict[str, Callable[[Block], tuple[int, ...]]] = {
    "lru": lambda block: (block.last_use,),
    "lfu": lambda block: (block.num_uses, block.last_use),
    "fifo": lambda block: (block.inserted,),
    "mru": lambda block: (-block.last_use,),
    "slru": lambda block: (block.num_uses > 1, block.last_use),
}


class RadixTreeMachine(RuleBasedStateMachine):
    """The tree behaves as a dict from prefix to block."""

    @initialize(policy=st.sampled_from(sorted(LEAVES_FIRST)))
    def make(self, policy: str) -> None:
        self.tree = RadixTree(32, policy)
        self.leaves_first = LEAVES_FIRST[policy]
        self.index: dict[Prefix, Block] = {}
        self.detached: set[Block] = set()
        self.locks: list[Lock] = []
        self.ids = itertools.count()
        self.clock = 0

    def path(self, names: Prefix, ready_only: bool) -> list[Block]:
        path: list[Block] = []
        for i in range(len(names)):
            block = self.index.get(names[: i + 1])
            if block is None or (ready_only and not block.ready):
                break
            path.append(block)
        return path

    def lock(self, names: Prefix, ready_only: bool) -> Lock:
        prefix = self.tree.lock_prefix(digests(names), ready_only=ready_only)
        path = self.path(names, ready_only)
        assert prefix.num_blocks == len(path)
        self.clock += 1
        for block in path:
            block.num_locks += 1
            block.last_use = self.clock
            block.num_uses += 1
        lock = Lock(prefix.handle, path)
        self.locks.append(lock)
        return lock

    @rule(names=SEQUENCES)
    def begin_get(self, names: Prefix) -> None:
        self.lock(names, ready_only=True)

    @rule(names=SEQUENCES, room=st.integers(0, 7))
    def begin_put(self, names: Prefix, room: int) -> None:
        lock = self.lock(names, ready_only=False)
        start = len(lock.path)
        end = min(len(names), start + room)
        if start == end:
            return
        now = self.clock
        lock.new = [Block(names[: i + 1], next(self.ids), now, now, num_locks=1) for i in range(start, end)]
        new_ids = np.array([block.block_id for block in lock.new], np.int64)
        lock.handle = self.tree.insert(lock.handle, digests(names)[start:end], new_ids)
        lock.path += lock.new
        lock.is_open = True
        self.index |= {block.prefix: block for block in lock.new}

    @rule(names=SEQUENCES)
    def put_at_once(self, names: Prefix) -> None:
        self.begin_put(names, room=len(names))
        if self.locks[-1].is_open:
            self.finish(self.locks[-1], ok=True)
        self.give_back(self.locks[-1])

    @precondition(lambda self: any(lock.is_open for lock in self.locks))
    @rule(data=st.data(), ok=st.booleans())
    def finish_put(self, data: st.DataObject, ok: bool) -> None:
        self.finish(data.draw(st.sampled_from([lock for lock in self.locks if lock.is_open])), ok)

    def finish(self, lock: Lock, ok: bool) -> None:
        lock.is_open = False
        if ok:
            for block in lock.new:
                block.ready = True
            servable = all(block.ready and block.attached for block in lock.path)
            assert self.tree.set_ready(lock.handle, len(lock.new)) == servable
            assert self.tree.is_servable(lock.handle) == servable
        else:
            self.remove(lock, len(lock.new))

    @precondition(lambda self: any(lock.path and not lock.is_open for lock in self.locks))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        lock = data.draw(st.sampled_from([lock for lock in self.locks if lock.path and not lock.is_open]))
        self.remove(lock, data.draw(st.integers(1, len(lock.path))))

    def remove(self, lock: Lock, count: int) -> None:
        top = lock.path[-count]
        below = [b for b in self.index.values() if top.attached and b.prefix[: len(top.prefix)] == top.prefix]
        served = {b.prefix for b in below if len(self.path(b.prefix, ready_only=True)) == len(b.prefix)}
        removal = self.tree.remove(lock.handle, count)
        assert sorted(removal.digests.tolist()) == sorted(digests(prefix)[-1].tolist() for prefix in served)
        for block in below:
            block.attached = False
            del self.index[block.prefix]
        self.detached |= {block for block in below if block.num_locks}
        assert sorted(removal.block_ids) == sorted(block.block_id for block in below if not block.num_locks)

    @precondition(lambda self: any(not lock.is_open for lock in self.locks))
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        self.give_back(data.draw(st.sampled_from([lock for lock in self.locks if not lock.is_open])))

    def give_back(self, lock: Lock) -> None:
        self.locks.remove(lock)
        freed = self.tree.unlock(lock.handle)
        for block in lock.path:
            block.num_locks -= 1
        gone = {block for block in self.detached if not block.num_locks}
        self.detached -= gone
        assert sorted(freed) == sorted(block.block_id for block in gone)

    @precondition(lambda self: any(lock.is_open for lock in self.locks))
    @rule(data=st.data())
    def unready_blocks_cannot_lose_their_only_lock(self, data: st.DataObject) -> None:
        lock = data.draw(st.sampled_from([lock for lock in self.locks if lock.is_open]))
        if any(block.num_locks == 1 and block.attached and not block.ready for block in lock.path):
            with pytest.raises(CacheStateError, match="unready"):
                self.tree.unlock(lock.handle)

    @rule(count=st.integers(0, 8))
    def evict(self, count: int) -> None:
        expected = []
        while len(expected) < count:
            parents = {prefix[:-1] for prefix in self.index}
            leaves = [b for b in self.index.values() if b.ready and not b.num_locks and b.prefix not in parents]
            if not leaves:
                break
            victim = min(leaves, key=self.leaves_first)
            expected.append(victim)
            del self.index[victim.prefix]
        removal = self.tree.evict(count)
        # Blocks of one node leave in the order they have in it, not from its end: compare as sets.
        assert sorted(removal.block_ids) == sorted(block.block_id for block in expected)
        by_id = {block.block_id: block for block in expected}
        for block_id, digest in zip(removal.block_ids.tolist(), removal.digests, strict=True):
            assert digest.tobytes() == digests(by_id[block_id].prefix)[-1].tobytes()

    @rule(names=SEQUENCES)
    def match(self, names: Prefix) -> None:
        present, ready = self.tree.match(digests(names))
        assert present == len(self.path(names, ready_only=False))
        assert ready == len(self.path(names, ready_only=True))

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.tree.check_integrity()
        counts = self.tree.counts()
        assert counts.num_blocks == len(self.index)
        assert counts.num_ready_blocks == sum(block.ready for block in self.index.values())
        assert counts.num_detached_blocks == len(self.detached)
        assert counts.num_locks == len(self.locks)
        held = [block.block_id for block in [*self.index.values(), *self.detached]]
        assert sorted(self.tree.all_block_ids()) == sorted(held)

    @invariant()
    def handles_survive_splits(self) -> None:
        for lock in self.locks:
            path = self.tree.path_block_ids(lock.handle, 0, len(lock.path))
            assert path.tolist() == [block.block_id for block in lock.path]
            assert self.tree.is_attached(lock.handle) == all(block.attached for block in lock.path)


RadixTreeMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestRadixTree = RadixTreeMachine.TestCase


def test_a_tree_refuses_what_it_cannot_have() -> None:
    with pytest.raises(ConfigError, match="multiple of 4"):
        RadixTree(7)
    with pytest.raises(ConfigError, match="random"):
        RadixTree(32, "random")


def test_every_policy_of_the_configuration_is_known() -> None:
    assert set(EVICTION_POLICIES) == set(LEAVES_FIRST)
    for policy in EVICTION_POLICIES:
        RadixTree(32, policy)


def test_a_stale_handle_is_refused() -> None:
    tree = RadixTree(32)
    lock = tree.lock_prefix(digests((1,)), ready_only=False)
    handle = tree.insert(lock.handle, digests((1,)), np.array([0]))
    tree.remove(handle, 1)
    assert tree.unlock(handle).tolist() == [0]
    for use in (tree.unlock, tree.is_attached, tree.is_servable, lambda h: tree.remove(h, 1)):
        with pytest.raises(CacheStateError, match="gone"):
            use(handle)


def test_a_digest_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes here, not 16"):
        RadixTree(32).match(np.zeros((1, 16), np.uint8))
