"""The model runner's own duties: rows, sampling options, seeds, and the connector's hooks in their order."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from tests.folovllm.runner_driver import GREEDY, RunnerDriver, make_runner

from folovllm.attention.backends.abstract import AttentionMetadata
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.arg_utils import EngineArgs
from folovllm.executor.factory import create_executor
from folovllm.executor.uniproc_executor import UniProcExecutor
from folovllm.model_executor.forward_context import ForwardContext
from folovllm.sampling_params import SamplingParams
from folovllm.worker.input_batch import CachedRequestState, InputBatch

NAME = "qwen3-wide-heads-gqa2"
VOCAB = 257
SEEDED = SamplingParams(temperature=1.0, seed=5, max_tokens=64)


def prompts_of(*lengths: int) -> list[list[int]]:
    return [random.Random(length).choices(range(VOCAB), k=length) for length in lengths]


@pytest.fixture
def driver(checkpoint):
    return RunnerDriver(make_runner(checkpoint(NAME)))


# -- sampling ---------------------------------------------------------------------------------------------------------
SAMPLED = [
    SEEDED,
    SamplingParams(temperature=0.7, top_k=20, seed=1, max_tokens=64),
    SamplingParams(temperature=1.2, top_p=0.8, seed=1, max_tokens=64),
    SamplingParams(temperature=2.0, top_k=50, top_p=0.9, seed=3, max_tokens=64),
]


def test_seeded_tokens_do_not_depend_on_batch_chunking_or_preemption(driver):
    prompts = prompts_of(3, 9, 14, 20)
    alone = [driver.generate([prompt], 10, params)[0] for prompt, params in zip(prompts, SAMPLED, strict=True)]
    assert len({tuple(tokens) for tokens in alone}) == 4

    for i, (prompt, params) in enumerate(zip(prompts, SAMPLED, strict=True)):
        driver.add(f"seeded{i}", prompt, params)
    for i, prompt in enumerate(prompts_of(5, 11, 6)):
        driver.add(f"noise{i}", prompt, SamplingParams(temperature=1.5, max_tokens=64))
    dice, outputs = random.Random(0), {}
    while driver.requests:
        victim = dice.choice(sorted(driver.requests))
        if driver.requests[victim].computed and dice.random() < 0.2:
            driver.preempt(victim)
        driver.step_all(chunk=dice.choice([1, 3, 7]))
        outputs.update(driver.collect(10))
    assert [outputs[f"seeded{i}"] for i in range(4)] == alone


def test_unseeded_requests_differ_from_each_other_and_repeat_with_the_engines_seed(checkpoint):
    params = SamplingParams(temperature=1.0, max_tokens=64)
    runs = []
    for seed in (0, 0, 1):
        runs.append(RunnerDriver(make_runner(checkpoint(NAME), seed=seed)).generate([[1, 2, 3]] * 3, 8, params))
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(tokens) for tokens in runs[0]}) == 3


def test_min_tokens_masks_eos_and_stop_tokens_until_reached(driver):
    (free,) = driver.generate([[4, 5, 6]], 8)
    params = SamplingParams(temperature=0.0, max_tokens=64, min_tokens=4, stop_token_ids=(free[1], 10**6))
    driver.add("r", [4, 5, 6], params, eos=(free[0],))
    while len(driver.requests["r"].output) < 8:
        driver.step_all()
        if len(driver.requests["r"].output) == 2:
            driver.preempt("r")
    output = driver.finish("r").output
    assert free[0] not in output[:4]
    assert free[1] not in output[:4]
    driver.add("s", [4, 5, 6], SamplingParams(temperature=0.0, max_tokens=64), eos=(free[0],))
    driver.step_all()
    assert driver.requests["s"].output == free[:1]


def test_partial_prefill_samples_nothing(driver):
    driver.add("r", prompts_of(10)[0])
    assert driver.step({"r": 4}).sampled_token_ids == {}
    assert driver.step({"r": 5}).sampled_token_ids == {}
    assert list(driver.step({"r": 1}).sampled_token_ids) == ["r"]


def test_the_last_position_of_the_context_is_sampled(checkpoint):
    driver = RunnerDriver(make_runner(checkpoint(NAME), max_model_len=16))
    driver.add("r", prompts_of(15)[0])
    driver.step_all()
    assert len(driver.step({"r": 1}).sampled_token_ids["r"]) == 1


# -- rows -------------------------------------------------------------------------------------------------------------
def test_finished_requests_are_forgotten_and_their_id_may_come_back(driver, checkpoint):
    first, second = prompts_of(9, 13)
    expected = driver.generate([second], 5)
    driver.add("r0", first)
    driver.step_all()
    driver.finish("r0")
    assert driver.generate([second], 5) == expected
    driver.step({})
    assert driver.runner.requests == {}
    assert driver.runner.input_batch.req_ids == []


def test_preempted_requests_hold_no_row(checkpoint):
    driver = RunnerDriver(make_runner(checkpoint(NAME), max_num_seqs=2))
    first, *others = prompts_of(7, 8, 9)
    expected = driver.generate([first], 5)
    driver.add("away", first)
    driver.step_all()
    driver.preempt("away")
    for i, prompt in enumerate(others):
        driver.add(str(i), prompt)
    for _ in range(3):
        driver.step({name: driver.requests[name].remaining for name in ("0", "1")})
    driver.finish("0")
    assert driver.run(5)["away"] == expected[0]


def test_input_batch_agrees_with_a_model_under_random_changes():
    """Random adds, removals, block and token appends against a dict of plain lists."""
    dice, batch = random.Random(1), InputBatch(max_num_reqs=6, max_model_len=64, block_size=4)
    model: dict[str, tuple[list[int], list[int], SamplingParams]] = {}
    for i in range(2000):
        action = dice.random()
        if action < 0.3 and len(model) < 6:
            tokens, blocks = dice.choices(range(99), k=dice.randint(1, 30)), dice.choices(range(1, 99), k=8)
            params = SamplingParams(temperature=dice.random(), top_k=dice.randint(0, 9), top_p=0.5, seed=i)
            state = CachedRequestState(f"r{i}", len(tokens), params, i, np.array([i]))
            batch.add(state, tokens, blocks, 0)
            model[f"r{i}"] = (tokens, blocks, params)
        elif action < 0.5 and model:
            req_id = dice.choice(sorted(model))
            batch.remove(req_id)
            del model[req_id]
        elif model:
            req_id = dice.choice(sorted(model))
            if action < 0.7 and len(model[req_id][1]) < 16:
                batch.append_blocks(batch.row_of[req_id], [i])
                model[req_id][1].append(i)
            elif len(model[req_id][0]) < 64:
                batch.append_tokens(np.array([batch.row_of[req_id]]), np.array([i]))
                model[req_id][0].append(i)
        assert sorted(batch.req_ids) == sorted(model)
        for req_id, (tokens, blocks, params) in model.items():
            row = batch.row_of[req_id]
            assert batch.req_ids[row] == req_id
            assert batch.token_ids[row, : batch.num_tokens[row]].tolist() == tokens
            assert batch.block_table[row, : batch.num_blocks[row]].tolist() == blocks
            assert (batch.top_k[row], batch.seeds[row], batch.states[row].masked_token_ids[0]) == (
                params.top_k,
                params.seed,
                params.seed,
            )


# -- connector --------------------------------------------------------------------------------------------------------
class RecordingConnector:
    """The worker half of a connector that writes down which hooks were called, and reports what it is told to."""

    def __init__(self, config: Any, role: Any) -> None:
        self.role = role
        self.calls: list[tuple[Any, ...]] = []
        self.kv_caches: dict[str, torch.Tensor] = {}
        self.invalid: set[int] = set()
        self.fail_on_load = False

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.kv_caches = kv_caches

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        self.calls.append(("bind", connector_metadata))

    def start_load_kv(self, forward_context: ForwardContext) -> None:
        self.calls.append(("start_load",))
        if self.fail_on_load:
            raise RuntimeError("the load failed")

    def wait_for_layer_load(self, layer_name: str) -> None:
        self.calls.append(("wait_load", layer_name))

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata) -> None:
        assert kv_layer is self.kv_caches[layer_name]
        assert kv_layer[attn_metadata.slot_blocks, 0, :, attn_metadata.slot_offsets].abs().sum() > 0
        self.calls.append(("save", layer_name))

    def wait_for_save(self) -> None:
        self.calls.append(("wait_save",))

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        self.calls.append(("finished", frozenset(finished_req_ids)))
        return {"sent"}, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        self.calls.append(("errors",))
        invalid, self.invalid = self.invalid, set()
        return invalid

    def get_kv_connector_stats(self) -> Any:
        return {"loads": 1}

    def clear_connector_metadata(self) -> None:
        self.calls.append(("clear",))

    def shutdown(self) -> None:
        self.calls.append(("shutdown",))


@pytest.fixture
def connected(checkpoint):
    """(executor, connector, driver) with the recording connector loaded by its dotted name."""
    args = EngineArgs(
        model=str(checkpoint(NAME)),
        device="cpu",
        block_size=4,
        num_kv_blocks=50,
        kv_transfer_config={"kv_connector": f"{__name__}.RecordingConnector"},
    )
    executor = create_executor(args.resolve())
    assert isinstance(executor, UniProcExecutor)
    yield executor, executor.worker.model_runner.connector, RunnerDriver(executor.worker.model_runner)
    executor.shutdown()


def test_connector_hooks_come_in_order_around_the_layers(connected):
    _, connector, driver = connected
    driver.add("r", [1, 2, 3])
    output = driver.step({"r": 3}, metadata="meta")
    layers = [f"model.layers.{i}.self_attn.attn" for i in range(2)]
    per_layer = [(hook, layer) for layer in layers for hook in ("wait_load", "save")]
    before, after = [("bind", "meta"), ("start_load",)], [("wait_save",), ("finished", frozenset()), ("errors",)]
    assert connector.calls == [*before, *per_layer, *after, ("clear",)]
    assert list(connector.kv_caches) == layers
    assert {cache.shape for cache in connector.kv_caches.values()} == {(50, 2, 2, 4, 32)}
    report = output.kv_connector_output
    assert (report.finished_sending, report.finished_recving) == ({"sent"}, set())
    assert report.kv_connector_stats == {"loads": 1}


def test_connector_hooks_are_called_on_steps_without_tokens(connected):
    executor, connector, _ = connected
    output = executor.execute_model(SchedulerOutput([], [], {}, 0, {"gone"}, set(), "meta")).result()
    names = [call[0] for call in connector.calls]
    assert names == ["bind", "start_load", "wait_save", "finished", "errors", "clear"]
    assert connector.calls[3] == ("finished", frozenset({"gone"}))
    assert output.sampled_token_ids == {}
    assert output.kv_connector_output.finished_sending == {"sent"}


def test_metadata_is_cleared_when_a_hook_fails(connected):
    _, connector, driver = connected
    connector.fail_on_load = True
    driver.add("r", [1, 2, 3])
    with pytest.raises(RuntimeError, match="the load failed"):
        driver.step({"r": 3})
    assert connector.calls[-1] == ("clear",)


def test_requests_on_invalid_blocks_yield_no_token_and_recover(connected):
    _, connector, driver = connected
    hurt, well = prompts_of(9, 10)
    driver.add("hurt", hurt)
    driver.add("well", well)
    driver.step({"hurt": 8, "well": 9})
    connector.invalid = {driver.requests["hurt"].blocks[1]}
    output = driver.step({"hurt": 1, "well": 1})
    assert list(output.sampled_token_ids) == ["well"]
    assert output.kv_connector_output.invalid_block_ids == {driver.requests["hurt"].blocks[1]}
    driver.requests["hurt"].computed = 4  # the scheduler recomputes from the first invalid block
    assert driver.run(6) == dict(zip(("hurt", "well"), driver.generate([hurt, well], 6, GREEDY), strict=True))


def test_shutdown_releases_the_connector_once(connected):
    executor, connector, _ = connected
    executor.shutdown()
    executor.shutdown()
    assert connector.calls == [("shutdown",)]


def test_executor_without_connector_reports_none(checkpoint):
    executor = create_executor(EngineArgs(model=str(checkpoint(NAME)), device="cpu", num_kv_blocks=8).resolve())
    assert executor.execute_model(SchedulerOutput([], [], {}, 0, set(), set())).result().kv_connector_output is None
