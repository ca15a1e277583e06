"""A recorded forward pass: the same bits as the model's own, for steps of every shape; never of what cannot repeat."""

import dataclasses
import random

import pytest
import torch
from tests.folovllm.runner_driver import RunnerDriver, make_runner

from folovllm.model_executor.recorded_forward import RecordedForward
from folovllm.worker.model_runner import ModelRunner

NAME = "qwen3-wide-heads-gqa2"
VOCAB = 257


class Counted:
    """A forward pass that counts how often Python runs it, and may compute something in torch."""

    def __init__(self, runner: ModelRunner, *, uses_torch: bool = False) -> None:
        self.model = runner.model
        self._uses_torch = uses_torch
        self.num_calls = 0

    def __call__(self, *args):
        self.num_calls += 1
        hidden = self.model(*args)
        return hidden.mul_(1.0) if self._uses_torch else hidden


def record(runner: ModelRunner, **options: bool) -> Counted:
    """Make the runner record a counted pass."""
    counted = Counted(runner, **options)
    workspaces = [runner.model.ops.workspace, runner.backend.workspace]
    assert None not in workspaces
    runner.compute = RecordedForward(counted, workspaces)
    return counted


def serve(runner: ModelRunner, seed: int = 0) -> dict[str, list[int]]:
    """Requests that come and go, in chunks of changing size."""
    driver, dice = RunnerDriver(runner), random.Random(seed)
    outputs: dict[str, list[int]] = {}
    for i in range(30):
        if i % 3 == 0:
            driver.add(f"r{i}", dice.choices(range(VOCAB), k=dice.randint(1, 40)))
        driver.step_all(chunk=dice.choice([1, 2, 30]))
        outputs.update(driver.collect(8))
    return outputs | driver.run(8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_those_of_the_models_own_pass(checkpoint, dtype):
    runner = make_runner(checkpoint(NAME), dtype=dtype, attention_backend="paged")
    counted = record(runner)
    recorded = serve(runner)
    assert counted.num_calls < 10
    plain = make_runner(checkpoint(NAME), dtype=dtype, attention_backend="paged")
    plain.compute = plain.model
    assert recorded == serve(plain)


def test_hidden_states_have_the_same_bits(checkpoint):
    runner = make_runner(checkpoint(NAME), attention_backend="paged")
    record(runner)
    compared = 0
    recorded = runner.compute

    def both(*args):
        nonlocal compared
        first = recorded(*args).clone()
        # The pass may be repeated: it writes the same keys and values again.
        assert torch.equal(first, runner.model(*args))
        compared += 1
        return first

    runner.compute = both
    serve(runner)
    assert compared > 30


def test_a_step_with_more_tokens_than_the_buffers_is_recorded_anew(checkpoint):
    runner = make_runner(checkpoint(NAME), attention_backend="paged")
    counted, driver = record(runner), RunnerDriver(runner)

    def calls_of(prompt_len: int) -> int:
        before = counted.num_calls
        driver.generate([[1] * prompt_len], 3)
        return counted.num_calls - before

    assert calls_of(5) == 2  # the first pass makes the buffers, the second is recorded
    assert calls_of(60) == 0
    assert calls_of(100) == 2
    assert calls_of(120) == calls_of(3) == 0


def test_inputs_elsewhere_are_read_where_they_are(checkpoint):
    runner = make_runner(checkpoint(NAME), attention_backend="paged")
    counted, recorded = record(runner), runner.compute
    expected = RunnerDriver(runner).generate([[1, 2, 3], [4, 5]], 6)
    before = counted.num_calls

    def moved(input_ids, positions, context):
        """All inputs copied, and the originals spoilt."""
        metadata = context.attn_metadata
        names = ("slot_mapping", "query_start_loc", "seq_lens", "block_tables")
        copies = dataclasses.replace(metadata, **{name: getattr(metadata, name).clone() for name in names})
        copies = dataclasses.replace(copies, backend_plan=runner.backend.plan(copies))
        elsewhere = input_ids.clone(), positions.clone()
        input_ids.zero_()
        metadata.slot_mapping.zero_()
        return recorded(*elsewhere, dataclasses.replace(context, attn_metadata=copies))

    runner.compute = moved
    assert RunnerDriver(runner).generate([[1, 2, 3], [4, 5]], 6) == expected
    assert counted.num_calls > before


def test_a_pass_in_which_torch_computes_is_never_recorded(checkpoint):
    runner = make_runner(checkpoint(NAME), attention_backend="paged")
    counted, driver = record(runner, uses_torch=True), RunnerDriver(runner)
    driver.generate([[1, 2, 3]], 6)
    assert counted.num_calls == 6


def test_a_pass_with_layer_hooks_runs_as_python(checkpoint):
    class Hooks:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def wait_for_layer_load(self, layer_name):
            self.calls.append(layer_name)

        def save_kv_layer(self, layer_name, kv_layer, attn_metadata):
            self.calls.append(layer_name)

        def __getattr__(self, name):
            return lambda *args: set() if name == "get_block_ids_with_load_errors" else (None, None)

    runner = make_runner(checkpoint(NAME), attention_backend="paged")
    driver = RunnerDriver(runner)
    driver.generate([[1, 2, 3]], 6)
    runner.connector = hooks = Hooks()
    driver.generate([[1, 2, 3]], 4)
    assert len(hooks.calls) == 4 * 2 * len(runner.kv_caches)


def test_kernels_of_other_rows_than_the_tokens_spoil_the_recording(checkpoint):
    runner = make_runner(checkpoint(NAME), attention_backend="paged")
    counted = record(runner)
    model, twice = runner.model, torch.zeros(2, runner.config.model_config.hf_config.hidden_size)

    class WithOneMoreNorm:
        def __call__(self, *args):
            hidden = model(*args)
            model.ops.rms_norm(twice, model.norm.weight, 1e-6)
            return hidden

    counted.model = WithOneMoreNorm()
    RunnerDriver(runner).generate([[1, 2, 3]], 6)
    assert counted.num_calls == 6
