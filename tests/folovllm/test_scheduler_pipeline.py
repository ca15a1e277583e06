"""Steps scheduled before the results of earlier ones are in: what must not happen to who ends, fails or gives way."""

import pytest
from tests.folovllm.core_fakes import FakeConnector, FakeRunner, expected_tokens, make_request, make_scheduler
from tests.folovllm.scheduler_driver import Pipeline

from folovllm.core.sched.output import ModelRunnerOutput
from folovllm.engine.messages import EngineCoreOutput
from folovllm.errors import InvalidRequestError
from folovllm.request import RequestStatus

PROMPT = list(range(18))
ABORTED = RequestStatus.FINISHED_ABORTED


def make(connector: FakeConnector | None = None, depth: int = 2, **options: object) -> Pipeline:
    scheduler = make_scheduler(connector=connector, **options)  # type: ignore[arg-type]
    return Pipeline(scheduler, FakeRunner(connector=connector), depth)


def add(pipeline: Pipeline, name: str, prompt: list[int], **options: object) -> None:
    pipeline.scheduler.add_request(make_request(name, prompt, **options))  # type: ignore[arg-type]


def finish(pipeline: Pipeline) -> dict[str, list[EngineCoreOutput]]:
    outputs: dict[str, list[EngineCoreOutput]] = {}
    for _ in range(500):
        if not pipeline.has_work:
            assert pipeline.scheduler.kv_cache_manager.usage == 0
            return outputs
        for output in pipeline.step():
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("not done")


def tokens_of(outputs: list[EngineCoreOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


def scheduled(pipeline: Pipeline) -> list[dict[str, int]]:
    return [step.output.num_scheduled_tokens for step in pipeline.in_flight]


def test_next_step_is_scheduled_for_a_token_that_is_not_known_yet() -> None:
    pipeline = make()
    add(pipeline, "a", [1, 2, 3])
    pipeline.launch()
    assert scheduled(pipeline) == [{"a": 3}, {"a": 1}]
    request = pipeline.scheduler.requests["a"]
    assert (request.num_tokens, request.num_output_placeholders, request.num_computed_tokens) == (3, 2, 4)
    assert tokens_of(finish(pipeline)["a"]) == expected_tokens([1, 2, 3], 8)


def test_chunks_of_a_prompt_follow_each_other_without_waiting() -> None:
    pipeline = make(budget=7)
    add(pipeline, "a", PROMPT, max_tokens=2)
    pipeline.launch()
    assert scheduled(pipeline) == [{"a": 7}, {"a": 7}]
    assert pipeline.complete() == []
    assert tokens_of(finish(pipeline)["a"]) == expected_tokens(PROMPT, 2)


@pytest.mark.parametrize(("max_tokens", "max_model_len", "num_blocks"), [(3, 128, 33), (50, 21, 33), (50, 128, 6)])
def test_no_token_is_computed_beyond_a_limit(max_tokens: int, max_model_len: int, num_blocks: int) -> None:
    """The length of a request is known beforehand: of max_tokens, of the context, of the pool."""
    pipeline = make(max_model_len=max_model_len, num_blocks=num_blocks, caching=False)
    add(pipeline, "a", PROMPT, max_tokens=max_tokens)
    num_scheduled, outputs = 0, []
    while pipeline.has_work:
        pipeline.launch()
        num_scheduled = max(num_scheduled, sum(step.output.total_num_scheduled_tokens for step in pipeline.in_flight))
        outputs += pipeline.complete()
    assert len(outputs) == 3
    assert outputs[-1].finish_reason == ("length" if num_blocks == 33 else "error")
    assert pipeline.runner.num_computed == len(PROMPT) + 2


def test_token_sampled_behind_a_stop_is_dropped() -> None:
    third = expected_tokens(PROMPT, 3)[2]
    pipeline = make()
    add(pipeline, "a", PROMPT, stop_token_ids=(third,))
    add(pipeline, "b", [50, 51])
    outputs = finish(pipeline)
    assert tokens_of(outputs["a"]) == expected_tokens(PROMPT, 3)
    assert outputs["a"][-1].finish_reason == "stop"
    assert tokens_of(outputs["b"]) == expected_tokens([50, 51], 8)


def test_blocks_of_who_stopped_are_kept_until_the_step_in_flight_is_in() -> None:
    first = expected_tokens(PROMPT, 1)[0]
    pipeline = make(num_blocks=6)
    add(pipeline, "a", PROMPT, stop_token_ids=(first,))
    pipeline.launch()
    (output,) = pipeline.complete()
    assert output.finish_reason == "stop"
    scheduler = pipeline.scheduler
    assert "a" in scheduler.leaving
    assert scheduler.kv_cache_manager.usage == 1.0
    with pytest.raises(InvalidRequestError, match="in use"):
        add(pipeline, "a", [1])
    assert not scheduler.kv_cache_manager.reset_prefix_cache()
    add(pipeline, "b", list(range(100, 117)), max_tokens=1)
    pipeline.launch()
    assert scheduled(pipeline)[-1] == {}, "there is no room yet"
    assert list(finish(pipeline)) == ["b"]


def test_abort_while_a_step_computes_the_request() -> None:
    pipeline = make()
    add(pipeline, "a", PROMPT)
    pipeline.step()
    pipeline.launch()
    pipeline.scheduler.finish_requests(["a"], ABORTED)
    assert pipeline.scheduler.kv_cache_manager.usage > 0
    assert finish(pipeline) == {}


def test_block_is_offered_once_its_tokens_are_known_and_not_before() -> None:
    pipeline = make()
    prompt = list(range(6))
    add(pipeline, "a", prompt)
    pool = pipeline.scheduler.kv_cache_manager.block_pool
    pipeline.launch()
    assert scheduled(pipeline) == [{"a": 6}, {"a": 1}]
    pipeline.step()  # the first token is known; the second, which fills the block, is being sampled
    pipeline.launch()
    request = pipeline.scheduler.requests["a"]
    assert (request.num_tokens, request.num_computed_tokens) == (7, 8)
    assert pool.num_cached_blocks == 1
    pipeline.complete()
    assert pool.num_cached_blocks == 2
    block = pool.get_cached_block(request.block_hashes[1])
    assert block is not None
    assert block.block_id == pipeline.scheduler.kv_cache_manager.get_block_ids("a")[1]


def test_who_is_in_flight_is_preempted_a_step_later() -> None:
    pipeline = make(num_blocks=5, caching=False)
    prompts = {"a": list(range(8)), "b": list(range(50, 57))}
    for name, prompt in prompts.items():
        add(pipeline, name, prompt, max_tokens=6)
    add(pipeline, "tiny", [1], max_tokens=1)
    pipeline.launch()
    # The second step needs a block for a's ninth token, and b, which would give it, is in flight.
    assert scheduled(pipeline) == [{"a": 8, "b": 7}]
    assert len(pipeline.complete()) == 2
    pipeline.launch()
    assert pipeline.in_flight[0].output.preempted_req_ids == {"b"}
    assert scheduled(pipeline)[0] == {"a": 1}
    outputs = finish(pipeline)
    assert tokens_of(outputs["a"]) == expected_tokens(prompts["a"], 6)[1:]
    assert tokens_of(outputs["b"]) == expected_tokens(prompts["b"], 6)[1:]


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("depth", [2, 3])
def test_load_that_fails_while_later_steps_compute_from_it(policy: str, depth: int) -> None:
    connector = FakeConnector(hits={"a": (16, False, 0, "fail:1")}, sends={"a": 2, "b": 2})
    pipeline = make(connector, depth, kv_load_failure_policy=policy)
    for name in "ab":
        add(pipeline, name, PROMPT)
    add(pipeline, "c", [90, 91])
    pipeline.launch()
    assert scheduled(pipeline)[:2] == [{"a": 2, "b": 2, "c": 2}, {"a": 1, "b": 1, "c": 1}]
    (output,) = pipeline.complete()
    assert output.request_id == "c", "it holds no bad block"
    add(pipeline, "late", PROMPT, max_tokens=2)
    outputs = finish(pipeline)
    for name in "ab":  # b shares the block whose load failed
        assert outputs[name][-1].finish_reason == ("length" if policy == "recompute" else "error")
        assert tokens_of(outputs[name]) == (expected_tokens(PROMPT, 8) if policy == "recompute" else [])
    assert tokens_of(outputs["c"]) == expected_tokens([90, 91], 8)[1:]
    assert tokens_of(outputs["late"]) == expected_tokens(PROMPT, 2)
    stats = pipeline.scheduler.make_stats()
    assert stats.external_prefix_cache_hits == (4 if policy == "recompute" else 0)


def test_abort_of_a_request_whose_failed_load_is_not_dealt_with_yet() -> None:
    """What the store saves of it, and what others find, ends before the bad block."""
    connector = FakeConnector(hits={"a": (16, False, 0, "fail:1")}, sends={"a": 2})
    pipeline = make(connector)
    add(pipeline, "a", PROMPT)
    pipeline.launch()
    pipeline.scheduler.finish_requests(["a"], ABORTED)
    pipeline.complete()
    add(pipeline, "b", PROMPT)
    outputs = finish(pipeline)  # the fakes check every slot that is read or saved
    assert tokens_of(outputs["b"]) == expected_tokens(PROMPT, 8)
    assert outputs["b"][0].num_cached_tokens == 4


def test_trap_cancelled_while_loading_with_steps_in_flight() -> None:
    connector = FakeConnector(hits={"a": (16, True, 4, "ok")})
    pipeline = make(connector, num_blocks=8)
    add(pipeline, "a", PROMPT)
    add(pipeline, "b", [50, 51])
    pipeline.step()
    pipeline.launch()
    pipeline.scheduler.finish_requests(["a"], ABORTED)
    assert tokens_of(finish(pipeline)["b"]) == expected_tokens([50, 51], 8)[1:]
    assert sorted(connector.finished) == ["a", "b"]


def test_results_out_of_order_are_a_bug_that_is_caught() -> None:
    pipeline = make()
    add(pipeline, "a", PROMPT)
    pipeline.launch()
    _, second = pipeline.in_flight
    with pytest.raises(AssertionError, match="order"):
        pipeline.scheduler.update_from_output(second.output, ModelRunnerOutput({"a": [1]}))
