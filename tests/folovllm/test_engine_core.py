"""The engine core in process, around a fake executor."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.folovllm.core_fakes import expected_tokens
from tests.folovllm.fake_core import (
    POISON,
    ConfiguredConnector,
    FakeExecutor,
    make_args,
    make_message,
    write_model,
)

from folovllm.engine.core import EngineCore
from folovllm.engine.messages import EngineCoreOutput, EngineCoreOutputs
from folovllm.errors import ConfigError, InvalidRequestError
from kvblocks.errors import PublisherError
from kvblocks.events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent, decode_batch
from kvblocks.replay import ReplayClient

CONNECTOR = {"kv_connector": "tests.folovllm.fake_core.ConfiguredConnector"}
MakeCore = Callable[..., EngineCore]


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def make_core(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MakeCore]:
    """make_core(**options) -> core; all are shut down afterwards."""
    cores = []

    def make(**options: Any) -> EngineCore:
        options["async_scheduling"] = request.param
        executor = FakeExecutor()
        core = EngineCore(make_args(write_model(tmp_path / "model"), **options).resolve(), executor)
        executor.runner.connector = core.connector  # type: ignore[assignment]
        cores.append(core)
        return core

    yield make
    for core in cores:
        core.shutdown()


def drain(core: EngineCore) -> dict[str, list[EngineCoreOutput]]:
    outputs: dict[str, list[EngineCoreOutput]] = {}
    for _ in range(500):
        if not core.has_work:
            return outputs
        for output in core.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("not done")


def tokens_of(outputs: list[EngineCoreOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


def test_requests_are_served_and_counted(make_core: MakeCore) -> None:
    core = make_core()
    core.add_request(make_message("a", [1, 2, 3]))
    core.add_request(make_message("b", [4, 5], 2))
    step = core.step()
    assert step.scheduler_stats is not None
    assert step.scheduler_stats.num_running_reqs == 2
    outputs = drain(core)
    assert tokens_of(step.outputs[:1]) + tokens_of(outputs["a"]) == expected_tokens([1, 2, 3], 4)
    assert outputs["b"][-1].finish_reason == "length"
    idle = core.step()
    assert idle == EngineCoreOutputs(scheduler_stats=idle.scheduler_stats)


def test_tenants_of_different_salts_share_nothing(make_core: MakeCore) -> None:
    core, prompt = make_core(), list(range(20))
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        core.add_request(make_message(name, prompt, cache_salt=salt))
        outputs = drain(core)[name]
        assert outputs[0].num_cached_tokens == (16 if name == "c" else 0)


def test_abort_produces_no_more_output(make_core: MakeCore) -> None:
    core = make_core()
    core.add_request(make_message("a", [1, 2, 3], 100))
    core.step()
    core.abort_requests(["a", "never heard of"])
    assert drain(core) == {}


def test_capacity_is_what_the_longest_request_may_have(make_core: MakeCore) -> None:
    core = make_core(num_kv_blocks=6, max_model_len=100)
    assert core.pool_tokens == 20
    core.add_request(make_message("long", list(range(21))))
    core.add_request(make_message("grows", list(range(10)), 90))
    outputs = drain(core)
    assert outputs["long"][-1].finish_reason == "error"
    assert outputs["grows"][-1].finish_reason == "length"
    assert len(outputs["grows"]) == 10


def test_id_in_use_is_refused(make_core: MakeCore) -> None:
    core = make_core()
    core.add_request(make_message("a", [1]))
    with pytest.raises(InvalidRequestError, match="in use"):
        core.add_request(make_message("a", [1]))


def test_reset_is_refused_while_requests_run(make_core: MakeCore) -> None:
    core, prompt = make_core(), list(range(12))
    core.add_request(make_message("a", prompt))
    core.step()
    assert not core.reset_prefix_cache()
    drain(core)
    assert core.reset_prefix_cache()
    core.add_request(make_message("b", prompt))
    assert drain(core)["b"][0].num_cached_tokens == 0


def test_reset_waits_for_saves_and_reaches_the_store_only_when_told(make_core: MakeCore) -> None:
    core, prompt = make_core(kv_transfer_config=CONNECTOR), list(range(12))
    connector = core.connector
    assert isinstance(connector, ConfiguredConnector)
    connector.sends["a"] = 3
    connector.hits = dict.fromkeys("bc", (8, True, 2, "ok"))
    core.add_request(make_message("a", prompt, 1))
    assert core.step().outputs[0].finish_reason == "length"
    assert core.scheduler.has_pending_transfers
    assert core.reset_prefix_cache()
    core.add_request(make_message("b", prompt))
    (first, *_) = drain(core)["b"]
    assert (first.num_cached_tokens, first.num_external_cached_tokens) == (8, 8)
    assert core.reset_prefix_cache(reset_connector=True)
    core.add_request(make_message("c", prompt))
    assert drain(core)["c"][0].num_cached_tokens == 0


def test_outputs_of_steps_that_a_reset_ran_are_not_lost(make_core: MakeCore) -> None:
    core = make_core()
    core.add_request(make_message("empty", []))
    assert core.reset_prefix_cache()
    assert core.has_work
    assert drain(core)["empty"][0].finish_reason == "error"


def test_events_of_device_and_store_are_published_in_order(make_core: MakeCore, tmp_path: Path) -> None:
    replay = f"ipc://{tmp_path}/replay"
    events_config = {"endpoint": f"ipc://{tmp_path}/pub", "replay_endpoint": replay, "topic": "kv@pod@m"}
    core = make_core(kv_events_config=events_config, kv_transfer_config=CONNECTOR)
    connector = core.connector
    assert isinstance(connector, ConfiguredConnector)
    core.add_request(make_message("a", list(range(9)), 1))
    stored = BlockStored([7], None, [], 4, medium="CPU")
    connector.events.append(stored)
    drain(core)
    assert core.reset_prefix_cache()
    core.add_request(make_message("b", list(range(9)), 1))
    drain(core)
    assert core.reset_prefix_cache(reset_connector=True)
    result = ReplayClient(replay).replay(0)
    events: list[KVEvent] = [event for frame in result.frames for event in decode_batch(frame.payload).events]
    assert [frame.topic for frame in result.frames] == ["kv@pod@m"] * len(result.frames)
    device = events[0]
    assert isinstance(device, BlockStored)
    assert (len(device.block_hashes), device.token_ids, device.medium) == (2, list(range(8)), "GPU")
    assert events[1] == stored
    assert isinstance(events[2], BlockRemoved), "the store keeps its blocks"
    assert sorted(events[2].block_hashes) == sorted(device.block_hashes)
    assert [type(event) for event in events[3:]] == [BlockStored, AllBlocksCleared]


def test_without_prefix_caching_a_connector_still_sees_block_hashes(make_core: MakeCore) -> None:
    core = make_core(kv_transfer_config=CONNECTOR, enable_prefix_caching=False)
    core.add_request(make_message("a", list(range(9))))
    assert len(core.scheduler.requests["a"].block_hashes) == 2


def test_shutdown_releases_the_connector_while_the_workers_live(make_core: MakeCore) -> None:
    core = make_core(kv_transfer_config=CONNECTOR)
    connector, executor = core.connector, core.executor
    assert isinstance(connector, ConfiguredConnector)
    assert isinstance(executor, FakeExecutor)
    executor.log = connector.log
    core.shutdown()
    core.shutdown()
    assert connector.log == ["connector", "executor"]


def test_what_was_built_is_released_when_the_rest_fails(make_core: MakeCore, tmp_path: Path) -> None:
    executor, events = FakeExecutor(), {"endpoint": f"ipc://{tmp_path}/pub", "replay_endpoint": f"ipc://{tmp_path}/r"}
    config = make_args(
        write_model(tmp_path / "model"), kv_transfer_config={"kv_connector": "no.such.Thing"}, kv_events_config=events
    ).resolve()
    with pytest.raises(ConfigError, match=r"kv_connector='no\.such\.Thing' cannot be loaded"):
        EngineCore(config, executor)
    assert executor.log == ["executor"]
    make_core(kv_events_config=events)  # the endpoint is free again


def test_events_endpoint_in_use_fails_before_the_model_is_loaded(make_core: MakeCore) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PublisherError):
        make_core(kv_events_config={"endpoint": f"tcp://*:{taken.getsockname()[1]}"})


def test_threshold_without_chunks_is_refused_before_anything_is_built(make_core: MakeCore) -> None:
    with pytest.raises(ConfigError, match="long_prefill_token_threshold=8 needs enable_chunked_prefill=True"):
        make_core(long_prefill_token_threshold=8, enable_chunked_prefill=False)


def test_priority_is_heeded_or_refused(make_core: MakeCore) -> None:
    with pytest.raises(InvalidRequestError, match="priority=1"):
        make_core().add_request(make_message("a", [1], priority=1))
    core = make_core(scheduling_policy="priority", max_num_seqs=1)
    for priority in (2, 1, 0):
        core.add_request(make_message(f"p{priority}", [1], 1, priority=priority))
    assert list(drain(core)) == ["p0", "p1", "p2"]


def test_id_of_a_request_that_just_ended_may_be_used_again(make_core: MakeCore) -> None:
    core = make_core()
    stop = expected_tokens([1, 2], 2)[-1]
    for _ in range(3):
        core.add_request(make_message("a", [1, 2], 50, eos_token_ids=(stop,)))
        outputs: list[EngineCoreOutput] = []
        while not outputs or outputs[-1].finish_reason is None:
            outputs += core.step().outputs
        assert tokens_of(outputs) == expected_tokens([1, 2], 2)


def test_reset_waits_for_steps_in_flight(make_core: MakeCore) -> None:
    core = make_core()
    core.add_request(make_message("a", list(range(9)), 1))
    core.add_request(make_message("b", list(range(50, 59)), 60, eos_token_ids=expected_tokens(list(range(50, 59)), 1)))
    assert {output.finish_reason for output in core.step().outputs} == {"length", "stop"}
    assert core.reset_prefix_cache()
    assert core.step().outputs == []


def test_failure_of_the_model_surfaces(make_core: MakeCore) -> None:
    core = make_core()
    core.add_request(make_message("good", [1], 50))
    core.step()
    core.add_request(make_message("bad", [POISON]))
    with pytest.raises(RuntimeError, match="the model met poison"):
        drain(core)
