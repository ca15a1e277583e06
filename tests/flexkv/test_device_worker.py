"""The gate and the fence of a device worker: when an op may run, and when it must not any more."""

import threading
from typing import ClassVar

import numpy as np
import pytest

from flexkv.transfer.device_tasks import CopyJob, DeviceTasks
from flexkv.transfer.device_worker import DeviceWorker

FAR = 1e12  # a deadline that does not come


def job(op_id: int, task_id: int, num_task_ops: int = 1, deadline: float = FAR) -> CopyJob:
    blocks = np.array([0])
    return CopyJob(op_id, task_id, num_task_ops, True, blocks, blocks, 0, None, deadline)


@pytest.fixture
def results():
    return []


@pytest.fixture
def tasks(results):
    return DeviceTasks(results.append, gated=True)


def run_next(tasks: DeviceTasks, error: str = "") -> int:
    taken = tasks.take()
    assert taken is not None
    tasks.finish(taken, error)
    return taken.op_id


def test_an_op_waits_for_its_release(tasks, results):
    tasks.add(job(1, 10))
    tasks.add(job(2, 20))
    tasks.release([20], FAR)
    assert run_next(tasks) == 2
    assert tasks.take_ended() == {20: ""}
    assert [result.op_id for result in results] == [2]


def test_a_release_may_come_before_its_op(tasks):
    tasks.release([10], FAR)
    assert tasks.take_ended() == {}
    tasks.add(job(1, 10))
    run_next(tasks)
    assert tasks.take_ended() == {10: ""}


def test_a_task_ends_with_its_last_op(tasks):
    tasks.release([10], FAR)
    tasks.add(job(1, 10, num_task_ops=2))
    run_next(tasks)
    assert tasks.take_ended() == {}
    tasks.add(job(2, 10, num_task_ops=2))
    run_next(tasks, error="broken")
    assert tasks.take_ended() == {10: "broken"}


def test_what_comes_after_the_deadline_is_refused(tasks, results):
    tasks.release([10], timeout_s=-1.0)
    assert tasks.take_ended() == {10: "deadline passed"}
    tasks.add(job(1, 10))
    assert [(result.op_id, result.ok) for result in results] == [(1, False)]
    tasks.close()
    assert tasks.take() is None


def test_a_running_op_outlives_the_deadline(tasks, results):
    tasks.add(job(1, 10))
    tasks.release([10], timeout_s=FAR)
    running = tasks.take()
    tasks.abandon([10], "cancelled")
    assert tasks.take_ended() == {}, "its blocks are being written"
    tasks.finish(running, "")
    assert tasks.take_ended() == {10: "cancelled"}
    assert [(result.op_id, result.ok) for result in results] == [(1, True)]


def test_a_cancelled_op_fails_its_task_also_when_released_later(tasks, results):
    tasks.add(job(1, 10))
    tasks.cancel({1, 99})
    assert tasks.take_ended() == {}, "the engine has not heard of it yet"
    tasks.release([10], FAR)
    assert list(tasks.take_ended()) == [10]
    assert [(result.op_id, result.ok) for result in results] == [(1, False)]


def test_a_held_op_expires(tasks, results):
    tasks.add(job(1, 10, deadline=0.0))
    tasks.expire()
    assert [(result.op_id, result.ok) for result in results] == [(1, False)]


def test_another_store_starts_with_a_clean_slate(tasks):
    tasks.release([10], FAR)
    tasks.start_over("the store has closed")
    assert tasks.take_ended() == {10: "the store has closed"}
    tasks.release([10], FAR)
    tasks.add(job(1, 10))
    assert run_next(tasks) == 1


def test_a_copy_for_the_store_before_keeps_its_task_number_until_it_ends(tasks, results):
    tasks.release([10], FAR)
    tasks.add(job(1, 10))
    running = tasks.take()
    tasks.start_over("another store took over")
    tasks.add(job(2, 10))
    assert [(result.op_id, result.ok) for result in results] == [(2, False)], "it must not join the task that runs"
    tasks.finish(running, "")
    assert tasks.take_ended() == {10: "another store took over"}


def test_ungated_ops_run_as_they_come(results):
    tasks = DeviceTasks(results.append, gated=False)
    tasks.add(job(1, 10))
    assert run_next(tasks) == 1
    assert tasks.take_ended() == {}


def test_the_worker_survives_a_failing_copy(results):
    ended = threading.Semaphore(0)
    tasks = DeviceTasks(lambda result: (results.append(result), ended.release()), gated=False)

    class Copier:
        calls: ClassVar[list[dict]] = []

        def wait_for_engine(self):
            pass

        def copy(self, **arguments):
            self.calls.append(arguments)
            if len(self.calls) == 1:
                raise OSError("injected")

    worker = DeviceWorker(tasks, Copier(), num_layers=5)
    worker.start()
    tasks.add(job(1, 10))
    tasks.add(job(2, 20))
    for _ in range(2):
        assert ended.acquire(timeout=10.0)
    tasks.close()
    worker.join(10.0)
    assert [(result.ok, result.is_data_bad) for result in results] == [(False, True), (True, False)]
    assert "injected" in results[0].error
    assert Copier.calls[1]["num_layers"] == 5
    assert (worker.stats.num_failed, worker.stats.num_loads) == (1, 1)
