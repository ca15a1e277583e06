"""GlobalCacheEngine over CPU memory and SSD: whatever ends well, badly or in part, no copy reads a wrong block.

The machine plays the workers: ops of the real scheduler end in any order, and move names between two memories.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flexkv.cache.global_cache_engine import GlobalCacheEngine
from flexkv.cache.loads import CacheLoad
from flexkv.cache.plans import CachePlan
from flexkv.common.block import SequenceMeta
from flexkv.common.config import CacheConfig, CpuTierConfig, EvictionConfig
from flexkv.common.transfer import TransferOp, TransferOpGraph, TransferType
from flexkv.transfer.scheduler import TransferScheduler
from flexkv.transfer.worker import OpResult
from kvblocks.events import BlockStored
from kvblocks.hashing import BlockHasher

HASHER = BlockHasher(block_size=1)
NUM_CPU_BLOCKS, NUM_SSD_BLOCKS = 6, 9
SEQUENCES = st.lists(st.integers(0, 1), min_size=1, max_size=7)
GARBAGE = b"garbage"


@dataclass(eq=False)
class Task:
    plan: CachePlan
    names: list[bytes]
    is_launched: bool = False


class TwoTierMachine(RuleBasedStateMachine):
    """`cpu` and `ssd` hold the digest of the block that was last written there."""

    @initialize(policy=st.sampled_from(["lru", "slru"]))
    def make(self, policy: str) -> None:
        config = CacheConfig(CpuTierConfig(num_blocks=NUM_CPU_BLOCKS), 1, EvictionConfig(policy, evict_ratio=0.0))
        self.engine = GlobalCacheEngine(config, NUM_CPU_BLOCKS, 32, NUM_SSD_BLOCKS)
        self.scheduler = TransferScheduler()
        self.cpu = [GARBAGE] * NUM_CPU_BLOCKS
        self.ssd = [GARBAGE] * NUM_SSD_BLOCKS
        self.running: dict[int, TransferOp] = {}
        self.owners: dict[int, Task | CacheLoad] = {}
        """By graph."""
        self.tasks: list[Task] = []
        self.announced: dict[str | None, set[object]] = {"CPU": set(), "STORAGE": set()}
        self.num_loads = 0

    # -- what callers do -------------------------------------------------------------------------------------------
    def plan(self, kind: str, tokens: list[int], skip: int) -> Task | None:
        meta = SequenceMeta.from_tokens(tokens, 1, HASHER)
        skip = min(skip, len(tokens))
        plan = self.engine.plan_get(meta, skip) if kind == "get" else self.engine.plan_put(meta, skip)
        for load in self.engine.take_loads():
            self.num_loads += 1
            self.submit(load.graph, load)
        if plan.graph is None:
            return None
        task = Task(plan, [row.tobytes() for row in meta.block_hashes])
        self.tasks.append(task)
        return task

    @rule(tokens=SEQUENCES, skip=st.integers(0, 3))
    def get(self, tokens: list[int], skip: int) -> None:
        self.plan("get", tokens, skip)

    @rule(tokens=SEQUENCES, skip=st.integers(0, 3))
    def put(self, tokens: list[int], skip: int) -> None:
        task = self.plan("put", tokens, skip)
        if task is not None and task.plan.num_blocks == 0:
            self.launch(task)

    @rule(tokens=SEQUENCES)
    def put_well(self, tokens: list[int]) -> None:
        task = self.plan("put", tokens, 0)
        if task is not None:
            self.launch(task)
            self.finish_all()

    @rule(tokens=SEQUENCES)
    def get_well(self, tokens: list[int]) -> None:
        task = self.plan("get", tokens, 0)
        if task is not None:
            self.launch(task)
            self.finish_all()

    @precondition(lambda self: any(not task.is_launched for task in self.tasks))
    @rule(data=st.data())
    def launch_one(self, data: st.DataObject) -> None:
        self.launch(data.draw(st.sampled_from([task for task in self.tasks if not task.is_launched])))

    @precondition(lambda self: any(not task.is_launched for task in self.tasks))
    @rule(data=st.data())
    def give_up_before_launch(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from([task for task in self.tasks if not task.is_launched]))
        self.tasks.remove(task)
        self.engine.release(task.plan)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.scheduler.give_up(data.draw(st.sampled_from(sorted(self.owners))))
        self.advance([])

    # -- what workers do -------------------------------------------------------------------------------------------
    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_failed=st.integers(0, 2), is_bad=st.booleans(), ok=st.booleans())
    def op_ends(self, data: st.DataObject, num_failed: int, is_bad: bool, ok: bool) -> None:
        op = self.running[data.draw(st.sampled_from(sorted(self.running)))]
        if op.type in (TransferType.H2D, TransferType.D2H):
            num_failed = 0  # device workers fail whole
        failed = tuple(data.draw(st.sets(st.integers(0, op.num_blocks - 1), min_size=0, max_size=num_failed)))
        self.end(op, OpResult(op.op_id, ok, failed=tuple(sorted(failed)), bad=failed[:1] if is_bad else ()))

    @precondition(lambda self: self.running)
    @rule()
    def finish_all(self) -> None:
        while self.running:
            op = next(iter(self.running.values()))
            self.end(op, OpResult(op.op_id, True))

    # -- the machinery ---------------------------------------------------------------------------------------------
    def launch(self, task: Task) -> None:
        task.is_launched = True
        plan = task.plan
        assert plan.graph is not None
        plan.graph.bind_device_blocks(np.arange(plan.num_blocks))
        if self.engine.is_broken(plan):
            self.tasks.remove(task)
            self.engine.release(plan)
            return
        self.submit(plan.graph, task)

    def submit(self, graph: TransferOpGraph, owner: Task | CacheLoad) -> None:
        self.owners[graph.graph_id] = owner
        self.scheduler.add(graph)
        self.advance([])

    def advance(self, finished: list[OpResult]) -> None:
        done, ready = self.scheduler.schedule(finished)
        for op in self.scheduler.take_abandoned():
            owner = self.owners[op.graph_id]
            if isinstance(owner, CacheLoad):
                self.engine.load_finished(owner, ok=False)
        for graph_id in done:
            owner = self.owners.pop(graph_id)
            if isinstance(owner, Task):
                self.tasks.remove(owner)
                self.engine.release(owner.plan)
        for op in ready:
            self.running[op.op_id] = op
            self.begin(op)

    def begin(self, op: TransferOp) -> None:
        """What an op is about to read is what it says."""
        owner = self.owners[op.graph_id]
        if op.type is TransferType.H2D:
            assert isinstance(owner, Task)
            first = owner.plan.first_block + int(op.dst_block_ids[0])
            wanted = owner.names[first : first + op.num_blocks]
            assert [self.cpu[block] for block in op.src_block_ids.tolist()] == wanted
        elif op.type is TransferType.H2DISK:
            assert op.content is not None
            assert [self.cpu[block] for block in op.src_block_ids.tolist()] == names_of(op)
        elif op.type is TransferType.DISK2H:
            assert [self.ssd[slot] for slot in op.src_block_ids.tolist()] == names_of(op)

    def end(self, op: TransferOp, result: OpResult) -> None:
        owner = self.owners[op.graph_id]
        if op.type is TransferType.H2D:
            self.begin(op)  # still the same: nobody wrote what is being read
        del self.running[op.op_id]
        self.write(op, owner, result)
        if isinstance(owner, CacheLoad):
            self.engine.load_finished(owner, result.ok, result.failed, result.bad)
        elif result.ok:
            self.engine.op_finished(owner.plan, op.op_id, True, result.failed)
        self.advance([result])
        self.follow_events()

    def write(self, op: TransferOp, owner: Task | CacheLoad, result: OpResult) -> None:
        if op.type is TransferType.H2D:
            return
        if op.type is TransferType.D2H:
            assert isinstance(owner, Task)
            names = owner.names[owner.plan.first_block : owner.plan.first_block + op.num_blocks]
        else:
            names = names_of(op)
        memory = self.ssd if op.type is TransferType.H2DISK else self.cpu
        for i, block in enumerate(op.dst_block_ids.tolist()):
            memory[block] = names[i] if result.ok and i not in result.failed else GARBAGE

    def follow_events(self) -> None:
        for event in self.engine.take_events():
            known = self.announced[event.medium]
            if isinstance(event, BlockStored):
                assert event.parent_block_hash is None or event.parent_block_hash in known
                assert known.isdisjoint(event.block_hashes)
                known |= set(event.block_hashes)
            else:
                assert set(event.block_hashes) <= known
                known -= set(event.block_hashes)

    @invariant()
    def is_whole(self) -> None:
        self.engine.check_integrity()

    def teardown(self) -> None:
        while self.running:
            self.finish_all()
        for task in list(self.tasks):
            self.engine.release(task.plan)
        self.engine.check_integrity()
        assert self.scheduler.num_graphs == 0
        assert self.engine.reset(), "something is held though nothing runs"


def names_of(op: TransferOp) -> list[bytes]:
    assert op.content is not None
    return [row.tobytes() for row in op.content.hashes]


TwoTierMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestTwoTiers = TwoTierMachine.TestCase
