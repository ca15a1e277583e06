"""The scheduler without a connector: budget, order, preemption, stops, and the traps of prefix caching."""

import pytest
from tests.folovllm.core_fakes import FakeRunner, expected_tokens, make_request, make_scheduler
from tests.folovllm.scheduler_driver import run_step, run_to_end

from folovllm.core.sched.output import ModelRunnerOutput
from folovllm.core.sched.scheduler import Scheduler
from folovllm.errors import InvalidRequestError
from folovllm.request import RequestStatus


def add(scheduler: Scheduler, name: str, prompt: list[int], **options: object) -> None:
    scheduler.add_request(make_request(name, prompt, **options))  # type: ignore[arg-type]


def prompt_of(seed: int, length: int) -> list[int]:
    return [seed * 100 + i for i in range(length)]


# -- one budget for prefill and decode --------------------------------------------------------------------------------
def test_running_requests_come_before_waiting_ones_under_one_budget() -> None:
    scheduler, runner = make_scheduler(budget=10), FakeRunner()
    add(scheduler, "a", prompt_of(1, 6))
    run_step(scheduler, runner)
    add(scheduler, "b", prompt_of(2, 20))
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 1, "b": 9}
    assert [data.req_id for data in output.scheduled_new_reqs] == ["b"]


def test_partial_prefill_emits_nothing_until_it_caught_up() -> None:
    scheduler, runner = make_scheduler(budget=4), FakeRunner()
    add(scheduler, "a", prompt_of(1, 10), max_tokens=1)
    assert run_step(scheduler, runner) == []
    assert run_step(scheduler, runner) == []
    (output,) = run_step(scheduler, runner)
    assert output.new_token_ids == expected_tokens(prompt_of(1, 10), 1)
    assert output.finish_reason == "length"


def test_without_chunking_a_prompt_waits_for_a_step_that_holds_it_whole() -> None:
    scheduler, runner = make_scheduler(budget=10, chunked=False), FakeRunner()
    add(scheduler, "a", prompt_of(1, 6), max_tokens=2)
    add(scheduler, "b", prompt_of(2, 6), max_tokens=2)
    assert scheduler.schedule().num_scheduled_tokens == {"a": 6}
    scheduler = make_scheduler(budget=10, chunked=False)
    for name in ("a", "b"):
        add(scheduler, name, prompt_of(ord(name), 6), max_tokens=2)
    tokens = run_to_end(scheduler, runner)
    assert tokens == {name: expected_tokens(prompt_of(ord(name), 6), 2) for name in ("a", "b")}


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler, runner = make_scheduler(max_num_seqs=2), FakeRunner()
    for i in range(5):
        add(scheduler, f"r{i}", prompt_of(i, 3), max_tokens=3)
    run_step(scheduler, runner)
    assert [r.request_id for r in scheduler.running] == ["r0", "r1"]
    assert len(run_to_end(scheduler, runner)) == 5


def test_outputs_equal_those_alone_for_any_budget() -> None:
    prompts = {f"r{i}": prompt_of(i, 3 + 5 * i) for i in range(5)}
    for budget in (5, 7, 16, 64):
        scheduler = make_scheduler(budget=budget, max_num_seqs=5)
        for name, prompt in prompts.items():
            add(scheduler, name, prompt)
        tokens = run_to_end(scheduler, FakeRunner())
        assert tokens == {name: expected_tokens(prompt, 8) for name, prompt in prompts.items()}


# -- preemption -------------------------------------------------------------------------------------------------------
def test_last_comer_gives_way_and_comes_back_first() -> None:
    scheduler, runner = make_scheduler(num_blocks=7, caching=False), FakeRunner()
    for i in range(3):
        add(scheduler, f"r{i}", prompt_of(i, 7), max_tokens=6)
    add(scheduler, "r3", prompt_of(3, 3), max_tokens=2)
    run_step(scheduler, runner)
    run_step(scheduler, runner)
    output = scheduler.schedule()
    assert output.preempted_req_ids == {"r2"}
    assert "r2" not in output.num_scheduled_tokens
    assert [r.request_id for r in scheduler.waiting] == ["r2", "r3"]
    scheduler.update_from_output(output, runner.execute_model(output))
    assert run_to_end(scheduler, runner)["r2"] == expected_tokens(prompt_of(2, 7), 6)[2:]
    assert scheduler.make_stats().num_preemptions >= 1


def test_nothing_is_admitted_in_a_step_that_preempted() -> None:
    scheduler, runner = make_scheduler(num_blocks=5, caching=False), FakeRunner()
    add(scheduler, "a", prompt_of(1, 8), max_tokens=6)
    add(scheduler, "b", prompt_of(2, 7), max_tokens=6)
    run_step(scheduler, runner)
    add(scheduler, "tiny", [1], max_tokens=1)
    output = scheduler.schedule()
    assert output.preempted_req_ids == {"b"}
    assert output.scheduled_new_reqs == []


def test_trap_preempted_request_hits_its_own_prefix_again() -> None:
    scheduler, runner = make_scheduler(num_blocks=7), FakeRunner()
    add(scheduler, "a", prompt_of(1, 8), max_tokens=12)
    add(scheduler, "b", prompt_of(2, 11), max_tokens=8)
    tokens: dict[str, list[int]] = {}
    resumed = []
    while scheduler.has_work:
        output = scheduler.schedule()
        resumed += [data for data in output.scheduled_cached_reqs if data.resumed_from_preemption]
        for out in scheduler.update_from_output(output, runner.execute_model(output)):
            tokens.setdefault(out.request_id, []).extend(out.new_token_ids)
            if out.request_id == "b":
                assert out.num_cached_tokens == 0, "its own blocks are no cache hit of the prompt"
    assert resumed
    assert resumed[0].req_id == "b"
    assert resumed[0].num_computed_tokens > 0, "its first block was not evicted, so it is hit"
    assert tokens["b"] == expected_tokens(prompt_of(2, 11), 8)


def test_trap_resumed_request_recomputes_its_outputs_in_chunks_and_samples_once() -> None:
    """A request with outputs may be far behind: no guess from "has outputs" to "decodes one token"."""
    scheduler, runner = make_scheduler(num_blocks=7, caching=False, budget=6), FakeRunner()
    add(scheduler, "a", prompt_of(1, 6), max_tokens=14)
    add(scheduler, "b", prompt_of(2, 4), max_tokens=14)
    tokens = run_to_end(scheduler, runner)
    assert scheduler.make_stats().num_preemptions >= 1
    assert tokens == {"a": expected_tokens(prompt_of(1, 6), 14), "b": expected_tokens(prompt_of(2, 4), 14)}


# -- prefix cache -----------------------------------------------------------------------------------------------------
def test_trap_prompt_of_full_blocks_that_is_wholly_cached() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    prompt = prompt_of(1, 16)
    add(scheduler, "a", prompt, max_tokens=3)
    first = run_to_end(scheduler, runner)["a"]
    add(scheduler, "b", prompt, max_tokens=3)
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"b": 4}
    assert output.scheduled_new_reqs[0].num_computed_tokens == 12
    (emitted,) = scheduler.update_from_output(output, runner.execute_model(output))
    assert emitted.num_cached_tokens == 12
    assert [*emitted.new_token_ids, *run_to_end(scheduler, runner)["b"]] == first


def test_trap_hit_on_blocks_still_being_computed_in_the_same_step() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    prompt = prompt_of(1, 13)
    add(scheduler, "a", prompt, max_tokens=4)
    add(scheduler, "b", [*prompt[:8], 7, 7, 7], max_tokens=4)
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 13, "b": 3}
    scheduler.update_from_output(output, runner.execute_model(output))  # the runner checks every slot read
    run_to_end(scheduler, runner)


def test_blocks_beyond_this_steps_chunk_are_not_hit() -> None:
    scheduler, runner = make_scheduler(budget=10), FakeRunner()
    prompt = prompt_of(1, 20)
    add(scheduler, "a", prompt)
    scheduler.update_from_output(output := scheduler.schedule(), runner.execute_model(output))
    add(scheduler, "b", prompt)
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 10}, "the budget is a's; b waits"
    scheduler.update_from_output(output, runner.execute_model(output))
    output = scheduler.schedule()
    assert output.scheduled_new_reqs[0].num_computed_tokens == 16
    scheduler.update_from_output(output, runner.execute_model(output))
    run_to_end(scheduler, runner)


def test_trap_several_samples_of_one_prompt_share_its_blocks() -> None:
    scheduler, runner = make_scheduler(num_blocks=13), FakeRunner()
    prompt = prompt_of(1, 17)
    for i in range(4):
        add(scheduler, f"0_{i}", prompt, max_tokens=3)
    output = scheduler.schedule()
    assert output.total_num_scheduled_tokens == 17 + 3
    tables = [data.block_ids for data in output.scheduled_new_reqs]
    assert all(table[:4] == tables[0][:4] for table in tables)
    assert len({table[4] for table in tables}) == 4, "what they generate is their own"
    scheduler.update_from_output(output, runner.execute_model(output))
    assert run_to_end(scheduler, runner) == {f"0_{i}": expected_tokens(prompt, 3)[1:] for i in range(4)}


def test_prefix_hits_are_counted_once_per_request_though_it_waits_for_room() -> None:
    scheduler, runner = make_scheduler(num_blocks=9), FakeRunner()
    add(scheduler, "a", prompt_of(1, 16), max_tokens=12)
    run_step(scheduler, runner)
    add(scheduler, "b", [*prompt_of(1, 12), *prompt_of(2, 16)], max_tokens=2)
    run_to_end(scheduler, runner)
    stats = scheduler.make_stats()
    assert stats.prefix_cache_queries == 16 + 28
    assert stats.prefix_cache_hits == 12
    assert stats.num_cached_blocks > 0
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.kv_cache_usage) == (0, 0, 0.0)


# -- ends -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_abort_in_any_state_frees_everything_and_tells_the_runner(steps_before: int) -> None:
    scheduler, runner = make_scheduler(num_blocks=9, max_num_seqs=2, budget=6), FakeRunner()
    for i in range(4):
        add(scheduler, f"r{i}", prompt_of(i, 9))
    for _ in range(steps_before):
        run_step(scheduler, runner)
    scheduler.finish_requests([f"r{i}" for i in range(4)] + ["unknown"], RequestStatus.FINISHED_ABORTED)
    assert not scheduler.has_unfinished_requests
    assert run_to_end(scheduler, runner) == {}
    assert scheduler.kv_cache_manager.usage == 0
    assert runner.rows == {}


def test_abort_of_a_preempted_request() -> None:
    scheduler, runner = make_scheduler(num_blocks=5, caching=False), FakeRunner()
    add(scheduler, "a", prompt_of(1, 8), max_tokens=4)
    add(scheduler, "b", prompt_of(2, 7), max_tokens=6)
    run_step(scheduler, runner)
    run_step(scheduler, runner)
    assert [r.request_id for r in scheduler.waiting] == ["b"]
    scheduler.finish_requests(["b"], RequestStatus.FINISHED_ABORTED)
    assert list(run_to_end(scheduler, runner)) == ["a"]


def test_prompt_that_can_never_run_ends_with_an_error() -> None:
    scheduler, runner = make_scheduler(num_blocks=4, max_model_len=100), FakeRunner()
    add(scheduler, "long", prompt_of(1, 13))
    add(scheduler, "fits", prompt_of(2, 12), max_tokens=1)
    add(scheduler, "empty", [])
    outputs = {output.request_id: output for output in run_step(scheduler, runner)}
    assert outputs["long"].finish_reason == "error"
    assert outputs["empty"].finish_reason == "error"
    assert outputs["fits"].finish_reason == "length"
    assert scheduler.capacity_tokens == 12


def test_prompt_longer_than_the_models_context_ends_with_an_error() -> None:
    scheduler, runner = make_scheduler(max_model_len=10), FakeRunner()
    add(scheduler, "long", prompt_of(1, 11))
    (output,) = run_step(scheduler, runner)
    assert output.finish_reason == "error"


def test_request_that_outgrows_the_pool_ends_with_an_error_and_others_go_on() -> None:
    scheduler, runner = make_scheduler(num_blocks=4, max_model_len=100), FakeRunner()
    add(scheduler, "grows", prompt_of(1, 8), max_tokens=50)
    add(scheduler, "next", prompt_of(2, 8), max_tokens=2)
    reasons = {}
    for _ in range(50):
        reasons |= {o.request_id: o.finish_reason for o in run_step(scheduler, runner) if o.finish_reason}
    assert reasons == {"grows": "error", "next": "length"}
    assert not scheduler.has_work


def test_id_in_use_is_refused() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", [1])
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        add(scheduler, "a", [2])


def test_runner_that_forgets_a_row_is_an_error() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", [1])
    output = scheduler.schedule()
    with pytest.raises(KeyError):
        scheduler.update_from_output(output, ModelRunnerOutput({}))


def test_finished_requests_are_told_once_and_then_there_is_no_work() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    add(scheduler, "a", [1, 2], max_tokens=1)
    run_step(scheduler, runner)
    assert scheduler.has_work
    assert not scheduler.has_unfinished_requests
    output = scheduler.schedule()
    assert (output.finished_req_ids, output.total_num_scheduled_tokens) == ({"a"}, 0)
    scheduler.update_from_output(output, runner.execute_model(output))
    assert not scheduler.has_work


def test_stop_token_ends_a_request_and_is_emitted() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    prompt = prompt_of(1, 5)
    third = expected_tokens(prompt, 3)[2]
    add(scheduler, "a", prompt, max_tokens=8, stop_token_ids=(third,))
    outputs = []
    while scheduler.has_work:
        outputs += run_step(scheduler, runner)
    assert outputs[-1].new_token_ids == [third]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", third)
