"""How many KV blocks fit: the arithmetic, and the step that is measured, on the CPU."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.folovllm.runner_driver import make_runner

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.core import EngineCore
from folovllm.errors import ConfigError
from folovllm.worker import kv_cache_sizing
from folovllm.worker.kv_cache_sizing import MemoryProfile, largest_step, num_blocks_that_fit, run_largest_step

GIB = 2**30
NAME = "qwen3-wide-heads-gqa2"


def test_blocks_take_what_weights_and_the_largest_step_leave_of_the_share():
    profile = MemoryProfile(total_bytes=80 * GIB, free_bytes=60 * GIB, step_bytes=2 * GIB)
    assert num_blocks_that_fit(profile, 0.9, GIB) == 72 - 20 - 2
    assert num_blocks_that_fit(profile, 0.9, GIB // 2) == 100


def test_no_room_is_an_error_that_says_what_takes_it():
    profile = MemoryProfile(total_bytes=16 * GIB, free_bytes=2 * GIB, step_bytes=GIB)
    with pytest.raises(ConfigError, match=r"16\.0 GiB, 14\.0 are in use and a step takes 1\.0.*gpu_memory_utilization"):
        num_blocks_that_fit(profile, 0.9, 1024)


@given(st.integers(1, 1 << 37), st.data())
def test_blocks_never_exceed_the_free_memory(total, data):
    free = data.draw(st.integers(0, total))
    step = data.draw(st.integers(0, total))
    block = data.draw(st.integers(1, 1 << 22))
    try:
        num_blocks = num_blocks_that_fit(MemoryProfile(total, free, step), data.draw(st.floats(0.05, 1.0)), block)
    except ConfigError:
        return
    assert num_blocks * block + step <= free


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({"max_num_batched_tokens": 40, "max_model_len": 64}, [40]),
        ({"max_num_batched_tokens": 130, "max_model_len": 64}, [64, 64, 2]),
        ({"max_num_batched_tokens": 4096, "max_model_len": 64, "max_num_seqs": 2}, [64, 64]),
    ],
)
def test_the_largest_step_fills_the_budget_and_runs(checkpoint, options, lengths):
    runner = make_runner(checkpoint(NAME), kernels="torch", **options)
    assert largest_step(runner.config) == lengths
    before = {name: cache.clone() for name, cache in runner.kv_caches.items()}
    run_largest_step(runner.config, runner.model, runner.backend)
    assert all((runner.kv_caches[name] == cache).all() for name, cache in before.items())


def test_the_engine_takes_the_number_of_blocks_that_its_worker_found(checkpoint, monkeypatch):
    args = EngineArgs(model=str(checkpoint(NAME)), device="cpu", dtype="float32", block_size=4, num_kv_blocks=2)
    config = args.resolve()
    config = replace(config, cache_config=replace(config.cache_config, num_kv_blocks=0))
    room = int(50.5 * config.kv_block_bytes)

    def profile(run, device):
        run()
        return MemoryProfile(room * 2, room * 2, room)

    monkeypatch.setattr(kv_cache_sizing, "profile_memory", profile)
    config = replace(config, cache_config=replace(config.cache_config, gpu_memory_utilization=1.0))
    core = EngineCore(config)
    try:
        assert core.config.cache_config.num_kv_blocks == 50
        assert core.pool_tokens == 49 * 4
        assert core.config.model_config.max_model_len == 49 * 4
        runner = core.executor.worker.model_runner
        assert {len(cache) for cache in runner.kv_caches.values()} == {50}
    finally:
        core.shutdown()


@pytest.mark.parametrize("value", [0.0, 1.1, -0.5])
def test_a_utilization_that_is_no_share_is_refused(checkpoint, value):
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        EngineArgs(model=str(checkpoint(NAME)), gpu_memory_utilization=value).check()
