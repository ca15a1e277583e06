"""Graphs in, ready ops out: order, failure and giving up; and the engine that runs them, with workers made of air."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.common.transfer import TransferOp, TransferOpGraph, TransferType
from flexkv.errors import TransferError
from flexkv.transfer.scheduler import TransferScheduler
from flexkv.transfer.transfer_engine import TransferEngine
from flexkv.transfer.worker import OpResult, TransferWorker


def op(kind: TransferType = TransferType.H2D) -> TransferOp:
    return TransferOp(kind, np.array([0]), np.array([0]))


def graph_of(num_ops: int, edges: list[tuple[int, int]], kinds=()) -> tuple[TransferOpGraph, list[int]]:
    graph = TransferOpGraph()
    kinds = dict(kinds)
    ids = [graph.add_op(op(kinds.get(i, TransferType.H2D))).op_id for i in range(num_ops)]
    for successor, predecessor in edges:
        graph.add_dependency(ids[successor], ids[predecessor])
    return graph, ids


def names(ops, ids):
    return sorted(ids.index(o.op_id) for o in ops)


def test_ops_wait_for_all_their_predecessors():
    graph, ids = graph_of(4, [(2, 0), (2, 1), (3, 2)])
    scheduler = TransferScheduler()
    scheduler.add(graph)
    done, ready = scheduler.schedule([])
    assert (done, names(ready, ids)) == ([], [0, 1])
    assert scheduler.schedule([OpResult(ids[0], True)]) == ([], [])
    assert names(scheduler.schedule([OpResult(ids[1], True)])[1], ids) == [2]
    assert names(scheduler.schedule([OpResult(ids[2], True)])[1], ids) == [3]
    assert scheduler.schedule([OpResult(ids[3], True)]) == ([graph.graph_id], [])
    assert scheduler.num_graphs == 0


def test_what_depends_on_a_failed_op_never_runs():
    graph, ids = graph_of(4, [(1, 0), (2, 1)])
    scheduler = TransferScheduler()
    scheduler.add(graph)
    scheduler.schedule([])
    done, ready = scheduler.schedule([OpResult(ids[0], False)])
    assert (done, ready) == ([], [])
    assert names(scheduler.take_abandoned(), ids) == [1, 2]
    assert scheduler.schedule([OpResult(ids[3], True)])[0] == [graph.graph_id], "the rest of the graph goes on"


def waiting_graph(*awaited: int) -> TransferOpGraph:
    graph = TransferOpGraph()
    graph.add_op(TransferOp(TransferType.H2D, np.array([0]), np.array([0]), waits_for=frozenset(awaited)))
    return graph


def test_an_op_waits_for_ops_of_other_graphs():
    load, load_ids = graph_of(2, [])
    scheduler = TransferScheduler()
    scheduler.add(load)
    get = waiting_graph(*load_ids)
    scheduler.add(get)
    done, ready = scheduler.schedule([])
    assert (done, names(ready, load_ids)) == ([], [0, 1])
    assert scheduler.schedule([OpResult(load_ids[0], True)]) == ([], [])
    done, ready = scheduler.schedule([OpResult(load_ids[1], True)])
    assert (done, [o.op_id for o in ready]) == ([load.graph_id], list(get.ops))
    late = waiting_graph(*load_ids)
    scheduler.add(late)
    assert [o.op_id for o in scheduler.schedule([])[1]] == list(late.ops), "what ended before has succeeded"


@pytest.mark.parametrize("result", [{"ok": False}, {"ok": True, "failed": (3,)}])
def test_an_op_that_waits_for_a_failed_one_never_runs(result):
    load, (load_id,) = graph_of(1, [])
    get = waiting_graph(load_id)
    scheduler = TransferScheduler()
    scheduler.add(load)
    scheduler.add(get)
    scheduler.schedule([])
    assert scheduler.schedule([OpResult(load_id, **result)]) == ([load.graph_id, get.graph_id], [])
    late = waiting_graph(load_id)
    scheduler.add(late)
    assert scheduler.schedule([]) == ([late.graph_id], [])
    assert {o.graph_id for o in scheduler.take_abandoned()} == {get.graph_id, late.graph_id}


def test_a_waiting_graph_can_be_given_up():
    load, (load_id,) = graph_of(1, [])
    get = waiting_graph(load_id)
    scheduler = TransferScheduler()
    scheduler.add(load)
    scheduler.add(get)
    scheduler.schedule([])
    scheduler.give_up(get.graph_id)
    assert scheduler.schedule([]) == ([get.graph_id], [])
    assert scheduler.schedule([OpResult(load_id, True)]) == ([load.graph_id], [])
    assert scheduler.num_graphs == 0


def test_virtual_ops_join_without_running():
    graph, ids = graph_of(3, [(1, 0), (2, 1)], {1: TransferType.VIRTUAL}.items())
    scheduler = TransferScheduler()
    scheduler.add(graph)
    scheduler.schedule([])
    assert names(scheduler.schedule([OpResult(ids[0], True)])[1], ids) == [2]


def test_a_graph_given_up_hands_out_nothing_more():
    graph, ids = graph_of(2, [(1, 0)])
    scheduler = TransferScheduler()
    scheduler.add(graph)
    scheduler.schedule([])
    scheduler.give_up(graph.graph_id)
    assert scheduler.schedule([OpResult(ids[0], True)]) == ([graph.graph_id], [])
    assert names(scheduler.take_abandoned(), ids) == [1]
    scheduler.give_up(graph.graph_id)  # done already


def test_unbound_empty_and_repeated_graphs_are_refused():
    scheduler = TransferScheduler()
    unbound = TransferOpGraph()
    unbound.add_op(TransferOp(TransferType.H2D, src_block_ids=np.array([1])))
    graph, _ = graph_of(1, [])
    scheduler.add(graph)
    for bad in (unbound, TransferOpGraph(), graph):
        with pytest.raises(TransferError):
            scheduler.add(bad)


def test_what_builds_on_blocks_that_failed_does_not_run():
    graph, ids = graph_of(2, [(1, 0)])
    scheduler = TransferScheduler()
    scheduler.add(graph)
    scheduler.schedule([])
    done, ready = scheduler.schedule([OpResult(ids[0], True, failed=(1,))])
    assert (done, ready) == ([graph.graph_id], [])
    assert [op.op_id for op in scheduler.take_abandoned()] == [ids[1]]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_op_ends_once_and_in_order(data):
    num_ops = data.draw(st.integers(1, 8))
    pairs = [(a, b) for a in range(num_ops) for b in range(a)]
    edges = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    failing = data.draw(st.sets(st.integers(0, num_ops - 1)))
    graph, ids = graph_of(num_ops, edges)
    scheduler = TransferScheduler()
    scheduler.add(graph)
    done, running = scheduler.schedule([])
    ended: dict[int, bool] = {}
    while not done:
        assert running, "a graph that is not done has something to run"
        finished = running.pop(data.draw(st.integers(0, len(running) - 1)))
        number = ids.index(finished.op_id)
        for successor, predecessor in edges:
            if successor == number:
                assert ended[predecessor], "ran before, or after a failed, predecessor"
        ended[number] = number not in failing
        done, ready = scheduler.schedule([OpResult(finished.op_id, ended[number])])
        running += ready
        for abandoned in scheduler.take_abandoned():
            assert ids.index(abandoned.op_id) not in ended
            ended[ids.index(abandoned.op_id)] = False
    assert set(ended) == set(range(num_ops))
    assert not running


class _Worker(TransferWorker):
    """Ends ops when told to; hands back what was cancelled or abandoned."""

    def __init__(self):
        self.submitted, self.cancelled, self.abandoned = [], [], []
        self.is_closed = False
        self.changed = threading.Condition()

    def start(self, report):
        self.report = report

    def submit(self, scheduled):
        with self.changed:
            self.submitted.append(scheduled)
            self.changed.notify_all()

    def cancel(self, op_id):
        self.cancelled.append(op_id)
        self.report(OpResult(op_id, False, "cancelled"))

    def abandon(self, task_id):
        self.abandoned.append(task_id)

    def close(self):
        if not self.is_closed:
            self.is_closed = True
            for scheduled in self.submitted:
                self.report(OpResult(scheduled.op.op_id, False, "closed"))

    def wait_for(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.submitted) >= count, 10.0)


class _Listener:
    def __init__(self):
        self.results: dict[int, list[OpResult]] = {}
        self.finished: list[int] = []
        self.changed = threading.Condition()

    def on_op_finished(self, task_id, result):
        self.results.setdefault(task_id, []).append(result)

    def on_graph_finished(self, task_id):
        with self.changed:
            self.finished.append(task_id)
            self.changed.notify_all()

    def wait_for(self, task_id):
        with self.changed:
            assert self.changed.wait_for(lambda: task_id in self.finished, 10.0)


@pytest.fixture
def make_engine():
    engines = []

    def make(op_timeout_s=30.0, worker=None):
        worker, listener = worker or _Worker(), _Listener()
        engine = TransferEngine({TransferType.H2D: worker}, listener, op_timeout_s)
        engine.start()
        engines.append(engine)
        return engine, worker, listener

    yield make
    for engine in engines:
        engine.close()
        engine.close()


def test_results_flow_back_before_the_graph_ends(make_engine):
    engine, worker, listener = make_engine()
    graph, ids = graph_of(2, [(1, 0)])
    engine.submit(graph, task_id=7)
    worker.wait_for(1)
    assert worker.submitted[0].num_task_ops == 2
    worker.report(OpResult(ids[0], True))
    worker.wait_for(2)
    worker.report(OpResult(ids[1], True))
    worker.report(OpResult(ids[1], True))  # said twice
    listener.wait_for(7)
    assert [result.op_id for result in listener.results[7]] == ids


def test_an_op_past_its_deadline_is_cancelled_at_its_worker(make_engine):
    engine, worker, listener = make_engine(op_timeout_s=0.05)
    graph, ids = graph_of(2, [(1, 0)])
    engine.submit(graph, task_id=1)
    listener.wait_for(1)
    assert worker.cancelled == [ids[0]]
    assert worker.abandoned == [1], "its second op will never come"
    assert [result.ok for result in listener.results[1]] == [False, False]


def test_cancel_before_and_while_running(make_engine):
    engine, worker, listener = make_engine()
    graph, _ = graph_of(2, [(1, 0)])
    engine.submit(graph, task_id=1)
    worker.wait_for(1)
    engine.cancel(graph.graph_id)
    engine.cancel(987)
    listener.wait_for(1)
    assert len(worker.submitted) == 1


def test_a_path_without_a_worker_fails_its_ops(make_engine):
    engine, _, listener = make_engine()
    graph = TransferOpGraph()
    graph.add_op(op(TransferType.DISK2H))
    engine.submit(graph, task_id=3)
    listener.wait_for(3)
    assert "DISK2H" in listener.results[3][0].error


def test_closing_fails_what_is_left_and_takes_nothing_more(make_engine):
    engine, worker, listener = make_engine()
    graph, _ = graph_of(1, [])
    engine.submit(graph, task_id=1)
    worker.wait_for(1)
    engine.close()
    listener.wait_for(1)
    assert not engine.is_alive
    with pytest.raises(TransferError, match="stopped"):
        engine.submit(graph_of(1, [])[0], task_id=2)


def test_a_bug_in_a_worker_ends_every_task_and_is_logged(make_engine, caplog):
    class Broken(_Worker):
        def submit(self, scheduled):
            raise RuntimeError("bug")

    engine, _, listener = make_engine(worker=Broken())
    engine.submit(graph_of(1, [])[0], task_id=1)
    listener.wait_for(1)
    assert not engine.is_alive
    assert "the transfer thread failed" in caplog.text
