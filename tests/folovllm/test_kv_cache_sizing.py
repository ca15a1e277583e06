"""How many KV blocks fit: the arithmetic, and the step that is measured, on the CPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.folovllm.runner_driver import make_runner

from folovllm.errors import ConfigError
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
