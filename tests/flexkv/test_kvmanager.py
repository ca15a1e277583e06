"""KVManager over real shared memory, sockets and threads: what is put comes back, byte for byte."""

import os
import threading

import numpy as np
import pytest
import torch
from tests.flexkv.device_memory import BLOCK, MODEL, fill_block, read_block, slots_of

from flexkv.common.config import CacheConfig, CpuTierConfig
from flexkv.common.request import ResponseStatus
from flexkv.errors import ConfigError, InvalidRequestError
from flexkv.kvmanager import KVManager
from flexkv.server import client
from flexkv.transfer.torch_copier import TorchCopier

TOKENS = list(range(100, 100 + 3 * BLOCK + 1))  # three blocks and a tail


def test_what_is_put_comes_back_into_other_blocks(make_stack):
    stack = make_stack()
    for block in (1, 2, 3):
        fill_block(stack.kv_caches, block, seed=block)
    assert stack.put(TOKENS, [1, 2, 3]) == 3

    task, mask = stack.store.get_match(TOKENS)
    assert mask.dtype == np.bool_
    assert mask.tolist() == [True] * 12 + [False]
    stack.store.launch([task], [slots_of([9, 7, 8])])
    response = stack.store.wait([task])[task]

    assert response.status is ResponseStatus.SUCCESS
    assert response.num_blocks == 3
    for source, target in ((1, 9), (2, 7), (3, 8)):
        assert read_block(stack.kv_caches, source) == read_block(stack.kv_caches, target)


def test_tensors_of_other_devices_go_through_torch(make_stack, monkeypatch):
    def through_torch(kv_caches, layout, pool, rank_offset, num_threads):
        return TorchCopier(kv_caches, layout, pool, rank_offset)

    monkeypatch.setattr(client, "make_copier", through_torch)
    stack = make_stack()
    fill_block(stack.kv_caches, 1, seed=1)
    stack.put(TOKENS[:BLOCK], [1])
    task = stack.store.get_async(TOKENS[:BLOCK], slots_of([9]))
    assert stack.store.wait([task])[task].ok
    assert read_block(stack.kv_caches, 9) == read_block(stack.kv_caches, 1)


def test_match_leaves_out_what_the_device_has(make_stack):
    stack = make_stack()
    stack.put(TOKENS, [1, 2, 3])
    on_device = np.arange(len(TOKENS)) >= BLOCK
    task, mask = stack.store.get_match(TOKENS, on_device)
    assert mask.tolist() == [False] * 4 + [True] * 8 + [False]
    stack.store.cancel([task])


def test_put_match_leaves_out_what_is_stored(make_stack):
    stack = make_stack()
    stack.put(TOKENS[:BLOCK], [1])
    task, mask = stack.store.put_match(torch.tensor(TOKENS, dtype=torch.int32))
    assert mask.tolist() == [False] * 4 + [True] * 8 + [False]
    stack.store.launch([task], [slots_of([2, 3])])
    assert stack.store.wait([task])[task].ok


def test_put_async_skips_the_stored_part_of_its_slots(make_stack):
    stack = make_stack()
    fill_block(stack.kv_caches, 3, seed=3)
    stack.put(TOKENS[: 2 * BLOCK], [1, 2])
    assert stack.put(TOKENS, [1, 2, 3]) == 1
    task = stack.store.get_async(TOKENS, slots_of([4, 5, 6, 7])[:13])
    assert stack.store.wait([task])[task].num_blocks == 3
    assert read_block(stack.kv_caches, 6) == read_block(stack.kv_caches, 3)


def test_arguments_are_never_changed(make_stack):
    stack = make_stack()
    tokens, mask, slots = np.array(TOKENS), np.ones(len(TOKENS), np.bool_), slots_of([1, 2, 3, 4])[:13]
    copies = tokens.copy(), mask.copy(), slots.copy()
    stack.store.wait([stack.store.put_async(tokens, slots, mask)])
    stack.store.cancel([stack.store.get_match(tokens, mask)[0]])
    for value, copy in zip((tokens, mask, slots), copies, strict=True):
        assert np.array_equal(value, copy)


def test_namespaces_share_nothing(make_stack):
    stack = make_stack()
    stack.put(TOKENS, [1, 2, 3])
    _, mask = stack.store.get_match(TOKENS, namespace="tenant-b")
    assert not mask.any()


def test_partial_put_when_room_is_short(make_stack):
    stack = make_stack(num_cpu_blocks=2)
    assert stack.put(TOKENS, [1, 2, 3]) == 2
    task, mask = stack.store.get_match(TOKENS)
    assert mask.sum() == 2 * BLOCK
    stack.store.cancel([task])


def test_misses_are_answers_not_errors(make_stack):
    store = make_stack().store
    task, mask = store.get_match(TOKENS)
    assert not mask.any()
    store.launch([task], [[]])
    assert store.wait([task])[task].status is ResponseStatus.NOT_FOUND
    assert store.wait([987_654])[987_654].status is ResponseStatus.NOT_FOUND
    assert store.get_match([])[1].shape == (0,)


def test_unlaunched_tasks_are_unready_and_cancel_rolls_back(make_stack):
    store = make_stack(num_cpu_blocks=3).store
    task, mask = store.put_match(TOKENS)
    assert mask.sum() == 12
    assert store.wait([task], timeout=0.0)[task].status is ResponseStatus.UNREADY
    assert store.try_wait([task]) == {}
    store.cancel([task])
    assert store.wait([task])[task].status is ResponseStatus.CANCELLED
    assert store.put_match(TOKENS)[1].sum() == 12, "the cancelled put still holds its blocks"


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (slots_of([1, 2]), r"integers \[12\]"),
        (slots_of([1, 2, 2]), "twice"),
        (slots_of([1, 2, 3]) + 1, "block boundary"),
        (slots_of([1, 2, 3])[::-1], "consecutive"),
        (slots_of([1, 2, 3]).astype(float), "integers"),
    ],
)
def test_bad_slots_are_refused_by_name(make_stack, slots, message):
    store = make_stack().store
    task, _ = store.put_match(TOKENS)
    with pytest.raises(InvalidRequestError, match=message):
        store.launch([task], [slots])
    store.cancel([task])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(5, np.bool_), r"bool \[13\]"),
        (np.ones(13, np.int8), "int8"),
        (np.arange(13) % 2 == 0, "more than one run"),
        (np.arange(13) >= 3, "token 3"),
    ],
)
def test_bad_masks_are_refused_by_name(make_stack, mask, message):
    store = make_stack().store
    with pytest.raises(InvalidRequestError, match=message):
        store.get_match(TOKENS, mask)


def test_bad_device_block_fails_the_task_and_moves_nothing(make_stack):
    stack = make_stack(num_device_blocks=8)
    task = stack.store.put_async(TOKENS[:BLOCK], slots_of([8]))
    response = stack.store.wait([task])[task]
    assert response.status is ResponseStatus.FAILED
    assert "device block 8" in response.error
    assert not stack.store.get_match(TOKENS)[1].any()


def test_reset_forgets_unless_tasks_are_alive(make_stack):
    store = (stack := make_stack()).store
    stack.put(TOKENS, [1, 2, 3])
    task, _ = store.get_match(TOKENS)
    assert not store.reset()
    store.cancel([task])
    assert store.reset()
    assert not store.get_match(TOKENS)[1].any()


def test_without_a_device_worker_everything_is_a_miss():
    with KVManager(MODEL, CacheConfig(CpuTierConfig(num_blocks=4), BLOCK)) as store:
        assert not store.is_ready()
        assert not store.put_match(TOKENS)[1].any()
        task = store.get_async(TOKENS, slots_of([1, 2, 3, 4])[:13])
        assert store.wait([task])[task].status is ResponseStatus.NOT_FOUND


def test_more_tasks_than_allowed_are_misses(make_stack):
    stack = make_stack(max_tasks=2)
    stack.put(TOKENS, [1, 2, 3])
    held = [stack.store.get_match(TOKENS)[0] for _ in range(2)]
    assert not stack.store.get_match(TOKENS)[1].any()
    stack.store.cancel(held)
    assert stack.store.get_match(TOKENS)[1].any()


def test_cancel_while_waiting_at_the_gate_frees_everything(make_stack):
    stack = make_stack(gated=True)
    task = stack.store.put_async(TOKENS, slots_of([1, 2, 3, 4])[:13])
    stack.store.cancel([task])
    assert stack.store.wait([task], completely=True)[task].status is ResponseStatus.CANCELLED
    assert stack.store.stats().num_in_flight_blocks == 0
    stack.store.check_integrity()


def test_an_op_that_cannot_begin_in_time_fails(make_stack):
    stack = make_stack(gated=True, op_timeout_s=0.2)
    task = stack.store.put_async(TOKENS, slots_of([1, 2, 3, 4])[:13])
    response = stack.store.wait([task], completely=True)[task]
    assert response.status is ResponseStatus.FAILED
    assert stack.store.stats().num_in_flight_blocks == 0


def test_events_announce_what_the_cpu_tier_holds(make_stack):
    stack = make_stack()
    stack.put(TOKENS, [1, 2, 3])
    (stored,) = stack.store.take_events()
    assert stored.medium == "CPU"
    assert stored.token_ids == TOKENS[:12]
    assert stack.store.take_events() == []


def test_shutdown_is_idempotent_and_leaves_no_file(make_stack, tmp_path):
    store = KVManager(MODEL, CacheConfig(CpuTierConfig(num_blocks=4), BLOCK), runtime_dir=tmp_path / "run")
    store.start()
    assert (store.device_dir / "device.sock").exists()
    assert os.stat(store.device_dir).st_mode & 0o077 == 0
    store.shutdown()
    store.shutdown()
    assert list((tmp_path / "run").iterdir()) == []


def test_shutdown_under_load_ends_every_task(make_stack):
    stack = make_stack(num_cpu_blocks=64)
    stop = threading.Event()
    answers = []

    def load(offset: int) -> None:
        while not stop.is_set():
            tokens = [offset, *TOKENS[1:]]
            task = stack.store.put_async(tokens[:12], slots_of([1, 2, 3]))
            answers.append(stack.store.wait([task], timeout=10.0)[task].status)
            offset += 1

    threads = [threading.Thread(target=load, args=(i * 1_000_000,)) for i in range(3)]
    for thread in threads:
        thread.start()
    while len(answers) < 20:
        stop.wait(0.01)
    stack.store.shutdown()
    stop.set()
    for thread in threads:
        thread.join(20.0)
    assert ResponseStatus.TIMEOUT not in answers


def test_two_stores_of_one_key_are_refused(tmp_path):
    cache = CacheConfig(CpuTierConfig(num_blocks=4), BLOCK)
    with (
        KVManager(MODEL, cache, runtime_dir=tmp_path, store_key="engine-a"),
        pytest.raises(ConfigError, match="engine-a"),
    ):
        KVManager(MODEL, cache, runtime_dir=tmp_path, store_key="engine-a")


def test_the_directory_of_a_dead_store_is_swept(tmp_path):
    stale = tmp_path / "flexkv-0123456789abcdef"
    stale.mkdir(mode=0o700)
    (stale / "lock").touch()
    (stale / "device.sock").touch()
    with KVManager(MODEL, CacheConfig(CpuTierConfig(num_blocks=4), BLOCK), runtime_dir=tmp_path):
        assert not stale.exists()
