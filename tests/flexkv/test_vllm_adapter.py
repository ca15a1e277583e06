"""The connector under an engine that calls its hooks in vLLM's order."""

import secrets
import sys
import threading
from types import SimpleNamespace

import pytest
from tests.flexkv.device_memory import BLOCK
from tests.flexkv.fake_engine import Blocks, FakeEngine, Request, Role, engine_config

from flexkv.errors import ConfigError
from flexkv.integration.vllm import scheduler_connector
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl

PROMPT = list(range(10, 10 + 3 * BLOCK + 2))


@pytest.fixture
def make_engine(tmp_path, monkeypatch):
    # A busy machine may need longer than an engine would wait; that would be a miss, and is not what is tested here.
    monkeypatch.setattr(scheduler_connector, "_SETTLE_TIMEOUT_S", 10.0)
    engines = []
    before = set(threading.enumerate())

    def make(role="kv_both", **extra):
        config = engine_config(secrets.token_hex(4), role, cpu_cache_gb=0.0001, runtime_dir=str(tmp_path), **extra)
        engine = FakeEngine(config)
        engines.append(engine)
        if engine.scheduler._scheduler is not None:
            assert engine.scheduler._scheduler.store.wait_ready(10.0)
        return engine

    yield make
    for engine in engines:
        engine.close()
        engine.close()
        assert len(engine.free) == 15, "device blocks leaked"
    assert set(threading.enumerate()) == before
    assert list(tmp_path.iterdir()) == []


def test_second_request_loads_what_the_first_computed(make_engine):
    engine = make_engine()
    assert engine.run("a", PROMPT) == 0
    assert engine.run("b", PROMPT) == 3 * BLOCK
    assert engine.run("c", [*PROMPT[:BLOCK], 1, 2, 3, 4, 5]) == BLOCK


def test_never_the_whole_prompt(make_engine):
    engine = make_engine()
    engine.run("a", PROMPT[: 2 * BLOCK])
    assert engine.run("b", PROMPT[: 2 * BLOCK]) == BLOCK
    assert engine.run("c", PROMPT[: 2 * BLOCK + 1]) == 2 * BLOCK


def test_only_what_the_device_lacks_is_counted(make_engine):
    engine = make_engine()
    engine.run("a", PROMPT)
    request = Request("b", PROMPT)
    assert engine.scheduler.get_num_new_matched_tokens(request, BLOCK) == (2 * BLOCK, True)
    assert engine.scheduler.get_num_new_matched_tokens(request, 3 * BLOCK) == (0, False)
    assert engine.scheduler.get_num_new_matched_tokens(request, 1) == (0, False)
    engine.scheduler.update_state_after_alloc(request, Blocks([]), 0)


def test_asking_twice_is_one_task(make_engine):
    engine = make_engine()
    engine.run("a", PROMPT)
    request = Request("b", PROMPT)
    for _ in range(3):  # the request waits for free device blocks
        assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (3 * BLOCK, True)
    assert engine.scheduler.request_finished(request, []) == (False, None)
    assert engine.scheduler.reset_cache() is True


def test_cache_salts_share_nothing(make_engine):
    engine = make_engine()
    engine.run("a", PROMPT, cache_salt="alice")
    assert engine.run("b", PROMPT, cache_salt="bob") == 0
    assert engine.run("c", PROMPT) == 0
    assert engine.run("d", PROMPT, cache_salt="alice") == 3 * BLOCK


def test_reset_cache_forgets(make_engine):
    engine = make_engine()
    assert engine.worker.reset_cache() is None
    for i in range(20):  # at once, while the store may not know yet that the last copy ended
        assert engine.run(f"cold {i}", PROMPT) == 0
        assert engine.run(f"warm {i}", PROMPT) == 3 * BLOCK
        assert engine.scheduler.reset_cache() is True


def test_roles_limit_what_is_loaded_and_saved(make_engine):
    producer = make_engine("kv_producer")
    producer.run("a", PROMPT)
    assert producer.run("b", PROMPT) == 0
    consumer = make_engine("kv_consumer")
    consumer.run("a", PROMPT)
    assert consumer.run("b", PROMPT) == 0
    assert consumer.scheduler._scheduler.store.stats().num_puts == 0


def test_failed_load_is_reported_recomputed_and_not_matched_again(make_engine):
    engine = make_engine()
    engine.run("a", PROMPT)
    request = Request("b", PROMPT)
    broken = engine.worker._worker._client._worker
    copier, broken._copier = broken._copier, _BrokenCopier()
    assert engine.admit(request)
    engine.await_load(request)
    broken._copier = copier
    assert request.num_computed_tokens == 0
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    engine.step(compute=request)
    engine.finish(request)
    assert engine.run("c", PROMPT) == 3 * BLOCK


class _BrokenCopier:
    def wait_for_engine(self):
        pass

    def copy(self, **_):
        raise OSError("injected")


def test_store_that_vanishes_during_a_load_is_a_miss(make_engine):
    engine = make_engine()
    engine.run("a", PROMPT)
    request = Request("b", PROMPT)
    assert engine.admit(request)
    engine.scheduler.shutdown()
    engine.await_load(request)
    assert request.num_computed_tokens == 0
    engine.step(compute=request)
    engine.finish(request)


def test_load_that_cannot_be_launched_fails_at_once(make_engine):
    engine = make_engine()
    request = Request("a", PROMPT, external=BLOCK)
    request.block_ids = [engine.free.pop(0) for _ in range(4)]
    engine.scheduler.update_state_after_alloc(request, Blocks(request.block_ids), BLOCK)  # never matched
    engine.await_load(request)
    assert request.num_computed_tokens < request.num_tokens
    engine.free.extend(request.block_ids)


def test_engine_may_take_less_than_was_offered(make_engine):
    engine = make_engine()
    engine.run("a", PROMPT)
    request = Request("b", PROMPT)
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (3 * BLOCK, True)
    request.block_ids = [engine.free.pop(0) for _ in range(4)]
    request.external = 2 * BLOCK
    engine.scheduler.update_state_after_alloc(request, Blocks(request.block_ids), 2 * BLOCK)
    engine.await_load(request)
    engine.check(request, 2)
    engine.step(compute=request)
    engine.finish(request)


def test_aborted_while_loading_saves_nothing(make_engine):
    engine = make_engine()
    engine.run("a", PROMPT)
    request = Request("b", PROMPT)
    assert engine.admit(request)
    request.num_computed_tokens = request.external  # engines count a load under way
    assert engine.scheduler.request_finished(request, request.block_ids) == (False, None)
    engine.await_load(request)  # the worker half reports the end, then the engine frees
    engine.free.extend(request.block_ids)


def test_events_and_stats(make_engine):
    engine = make_engine()
    engine.run("a", PROMPT)
    (stored,) = engine.scheduler.take_events()
    assert stored.medium == "CPU"
    assert stored.token_ids == PROMPT[: 3 * BLOCK]
    stats = engine.worker.get_kv_connector_stats()
    assert stats.reduce()["stored_blocks"] == 3
    assert engine.worker.get_kv_connector_stats() is None


def test_metadata_is_taken_from_vllm_when_it_is_not_bound(make_engine, monkeypatch):
    engine = make_engine()
    group = SimpleNamespace(_get_connector_metadata=lambda: bound[0])
    bound = [None]
    module = SimpleNamespace(get_kv_transfer_group=lambda: group)
    monkeypatch.setitem(sys.modules, "vllm.distributed.kv_transfer", module)
    monkeypatch.setattr(engine.worker, "bind_connector_metadata", lambda metadata: bound.__setitem__(0, metadata))
    engine.run("a", PROMPT)
    assert engine.run("b", PROMPT) == 3 * BLOCK


def test_turned_off_everything_is_a_miss(make_engine, monkeypatch):
    monkeypatch.setenv("ENABLE_FLEXKV", "0")
    engine = make_engine()
    assert engine.run("a", PROMPT) == 0
    assert engine.run("b", PROMPT) == 0
    assert list(engine.scheduler.take_events()) == []


def test_unknown_connector_option_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean cpu_cache_gb"):
        FlexKVConnectorV1Impl(engine_config("x", cpu_cache_gbs=1), Role.SCHEDULER)
