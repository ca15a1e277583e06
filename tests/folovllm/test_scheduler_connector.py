"""The scheduler with a KV connector: hits, loads that take time, that fail, that nobody wants any more."""

import pytest
from tests.folovllm.core_fakes import FakeConnector, FakeRunner, expected_tokens, make_request, make_scheduler
from tests.folovllm.scheduler_driver import check_invariants, run_step, run_to_end

from folovllm.core.sched.scheduler import Scheduler
from folovllm.request import RequestStatus

PROMPT = list(range(18))


def make(connector: FakeConnector, **options: object) -> tuple[Scheduler, FakeRunner]:
    return make_scheduler(connector=connector, **options), FakeRunner(connector=connector)  # type: ignore[arg-type]


def add(scheduler: Scheduler, name: str, prompt: list[int] = PROMPT, max_tokens: int = 4) -> None:
    scheduler.add_request(make_request(name, prompt, max_tokens=max_tokens))


def collect(scheduler: Scheduler, runner: FakeRunner) -> tuple[dict[str, list[int]], dict[str, tuple[int, int]]]:
    """Tokens, and (cached, external) tokens, of each request."""
    tokens: dict[str, list[int]] = {}
    cached: dict[str, tuple[int, int]] = {}
    for _ in range(500):
        if not scheduler.has_work:
            return tokens, cached
        for output in run_step(scheduler, runner):
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
            cached[output.request_id] = (output.num_cached_tokens, output.num_external_cached_tokens)
    raise AssertionError("not done")


def test_synchronous_hit_is_loaded_and_computed_in_one_step() -> None:
    scheduler, runner = make(FakeConnector(hits={"a": (16, False, 0, "ok")}))
    add(scheduler, "a")
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 2}
    assert output.scheduled_new_reqs[0].num_computed_tokens == 16
    (emitted,) = scheduler.update_from_output(output, runner.execute_model(output))
    assert (emitted.num_cached_tokens, emitted.num_external_cached_tokens) == (16, 16)
    assert emitted.new_token_ids == expected_tokens(PROMPT, 1)
    stats = scheduler.make_stats()
    assert (stats.external_prefix_cache_queries, stats.external_prefix_cache_hits) == (18, 16)
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (18, 0)


def test_external_hit_is_asked_for_behind_the_local_one() -> None:
    connector = FakeConnector()
    scheduler, runner = make(connector)
    add(scheduler, "first", PROMPT[:10])
    collect(scheduler, runner)
    connector.hits["a"] = (16, True, 1, "ok")
    add(scheduler, "a")
    tokens, cached = collect(scheduler, runner)
    assert cached == {"a": (16, 8)}
    assert tokens["a"] == expected_tokens(PROMPT, 4)


def test_more_than_the_prompt_leaves_a_token_to_compute() -> None:
    for is_async in (False, True):
        scheduler, runner = make(FakeConnector(hits={"a": (99, is_async, 1, "ok")}))
        add(scheduler, "a", PROMPT[:16])
        tokens, cached = collect(scheduler, runner)
        assert tokens["a"] == expected_tokens(PROMPT[:16], 4)
        assert cached["a"][0] == 15


def test_one_token_prompt_that_is_wholly_external_does_not_load_for_ever() -> None:
    scheduler, runner = make(FakeConnector(hits={"a": (1, True, 1, "ok")}))
    add(scheduler, "a", [5])
    assert collect(scheduler, runner)[0]["a"] == expected_tokens([5], 4)


def test_others_run_while_a_request_waits_for_its_load() -> None:
    scheduler, runner = make(FakeConnector(hits={"a": (16, True, 3, "ok")}))
    add(scheduler, "a")
    add(scheduler, "b", [50, 51], max_tokens=10)
    output = scheduler.schedule()
    assert list(output.num_scheduled_tokens) == ["b"]
    assert scheduler.requests["a"].status is RequestStatus.WAITING_FOR_REMOTE_KVS
    scheduler.update_from_output(output, runner.execute_model(output))
    steps_of_a = []
    for _ in range(4):
        output = scheduler.schedule()
        steps_of_a.append(output.num_scheduled_tokens.get("a"))
        scheduler.update_from_output(output, runner.execute_model(output))
    assert steps_of_a == [None, None, 2, 1]


def test_loading_blocks_are_not_hit_by_others() -> None:
    scheduler, runner = make(FakeConnector(hits={"a": (16, True, 3, "ok")}))
    add(scheduler, "a")
    add(scheduler, "b")
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"b": 18}
    scheduler.update_from_output(output, runner.execute_model(output))
    tokens, _ = collect(scheduler, runner)
    assert tokens["a"] == expected_tokens(PROMPT, 4)


def test_connector_that_does_not_know_yet_is_asked_again_and_others_go_first() -> None:
    connector = FakeConnector(hits={"a": (16, False, 0, "ok")}, undecided={"a": 2})
    scheduler, runner = make(connector)
    add(scheduler, "a")
    add(scheduler, "b", [50, 51])
    output = scheduler.schedule()
    assert list(output.num_scheduled_tokens) == ["b"]
    scheduler.update_from_output(output, runner.execute_model(output))
    tokens, cached = collect(scheduler, runner)
    assert connector.asked.count("a") == 3
    assert tokens["a"] == expected_tokens(PROMPT, 4)
    assert cached["a"] == (16, 16)


# -- loads that fail --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("bad_block", [0, 1, 3])
@pytest.mark.parametrize("caching", [False, True])
def test_failed_load_is_recomputed_from_the_first_bad_block(is_async: bool, bad_block: int, caching: bool) -> None:
    connector = FakeConnector(hits={"a": (16, is_async, 2, f"fail:{bad_block}")})
    scheduler, runner = make(connector, caching=caching)
    add(scheduler, "a")
    computed_from = []
    tokens: list[int] = []
    for _ in range(20):
        output = scheduler.schedule()
        if "a" in output.num_scheduled_tokens:
            news = [*output.scheduled_new_reqs, *output.scheduled_cached_reqs]
            computed_from += [data.num_computed_tokens for data in news]
        for emitted in scheduler.update_from_output(output, runner.execute_model(output)):
            tokens += emitted.new_token_ids
            assert emitted.num_cached_tokens == emitted.num_external_cached_tokens == bad_block * 4
        check_invariants(scheduler, runner)
    assert tokens == expected_tokens(PROMPT, 4)
    assert computed_from[0 if is_async else 1] == bad_block * 4
    assert connector.asked == ["a"], "the same bad entry would match again"
    assert scheduler.make_stats().external_prefix_cache_hits == bad_block * 4


def test_tokens_sampled_behind_a_failed_load_are_dropped() -> None:
    scheduler, runner = make(FakeConnector(hits={"a": (16, False, 0, "fail:0")}))
    add(scheduler, "a")
    output = scheduler.schedule()
    result = runner.execute_model(output)
    assert "a" in result.sampled_token_ids
    assert scheduler.update_from_output(output, result) == []
    assert scheduler.requests["a"].num_output_tokens == 0
    output = scheduler.schedule()
    assert output.preempted_req_ids == {"a"}
    assert output.scheduled_cached_reqs[0].resumed_from_preemption


def test_request_that_shares_a_block_whose_load_fails_in_the_same_step_is_recomputed_too() -> None:
    scheduler, runner = make(FakeConnector(hits={"a": (16, False, 0, "fail:1")}))
    add(scheduler, "a")
    add(scheduler, "b")
    add(scheduler, "c", PROMPT[:6])
    add(scheduler, "d", [90, 91])
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 2, "b": 2, "c": 2, "d": 2}
    emitted = scheduler.update_from_output(output, runner.execute_model(output))
    assert [o.request_id for o in emitted] == ["c", "d"], "they hold no bad block"
    check_invariants(scheduler, runner)
    tokens, _ = collect(scheduler, runner)
    assert tokens["a"] == tokens["b"] == expected_tokens(PROMPT, 4)
    assert tokens["c"] == expected_tokens(PROMPT[:6], 4)[1:]


def test_wrong_blocks_behind_a_bad_one_are_traced_to_requests_that_do_not_hold_it() -> None:
    """The bad block has a good copy, too: who got that one still computed with what stands behind the bad one."""
    connector = FakeConnector()
    scheduler, runner = make(connector)
    add(scheduler, "old", PROMPT[:8], max_tokens=1)
    collect(scheduler, runner)
    pool = scheduler.kv_cache_manager.block_pool
    # Evict the first block alone: the second stays cached, but is out of reach for a prefix search.
    first = pool.get_cached_block(make_request("x", PROMPT).block_hashes[0])
    assert first is not None
    pool.evict_blocks([first])
    connector.hits["a"] = (8, False, 0, "fail:1")
    add(scheduler, "a")
    add(scheduler, "b")
    output = scheduler.schedule()
    tables = {data.req_id: data.block_ids for data in output.scheduled_new_reqs}
    assert tables["a"][1] != tables["b"][1], "b has the good copy of the block that fails"
    assert tables["a"][2] == tables["b"][2], "and what a computes behind the bad one"
    assert scheduler.update_from_output(output, runner.execute_model(output)) == []
    tokens, _ = collect(scheduler, runner)
    assert tokens["a"] == tokens["b"] == expected_tokens(PROMPT, 4)


def test_policy_fail_ends_the_request_whose_load_failed() -> None:
    for is_async in (False, True):
        connector = FakeConnector(hits={"a": (16, is_async, 2, "fail:0")})
        scheduler, runner = make(connector, kv_load_failure_policy="fail")
        add(scheduler, "a")
        add(scheduler, "b", [50, 51])
        reasons = {}
        while scheduler.has_work:
            reasons |= {o.request_id: o.finish_reason for o in run_step(scheduler, runner) if o.finish_reason}
        assert reasons == {"a": "error", "b": "length"}


# -- ends while a transfer uses the blocks ----------------------------------------------------------------------------
def test_trap_cancelled_while_loading_keeps_its_blocks_until_the_load_ended() -> None:
    connector = FakeConnector(hits={"a": (16, True, 3, "ok")})
    scheduler, runner = make(connector, num_blocks=6)
    add(scheduler, "a")
    run_step(scheduler, runner)
    scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    assert scheduler.kv_cache_manager.usage > 0
    assert not scheduler.kv_cache_manager.reset_prefix_cache()
    add(scheduler, "b", list(range(100, 117)))
    run_step(scheduler, runner)
    assert "b" not in runner.rows, "there is no room before the load ended"
    assert scheduler.has_work
    tokens, _ = collect(scheduler, runner)
    assert tokens == {"b": expected_tokens(list(range(100, 117)), 4)[:4]}
    assert connector.finished == ["a", "b"]


def test_cancelled_while_loading_and_saving_waits_for_both() -> None:
    connector = FakeConnector(hits={"a": (16, True, 2, "ok")}, sends={"a": 4})
    scheduler, runner = make(connector)
    add(scheduler, "a")
    run_step(scheduler, runner)
    scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    steps = 0
    while scheduler.has_work:
        run_step(scheduler, runner)
        steps += 1
    assert steps == 4
    assert scheduler.kv_cache_manager.usage == 0


def test_blocks_being_saved_are_freed_when_the_connector_says_so() -> None:
    connector = FakeConnector(sends={"a": 3})
    scheduler, runner = make(connector)
    add(scheduler, "a", max_tokens=1)
    (output,) = run_step(scheduler, runner)
    assert output.finish_reason == "length"
    assert scheduler.kv_cache_manager.usage > 0
    assert scheduler.has_work
    run_to_end(scheduler, runner)
    assert scheduler.kv_cache_manager.usage == 0


def test_connector_hears_of_a_request_that_ended_before_it_had_blocks() -> None:
    connector = FakeConnector(sends={"a": 3})
    scheduler, runner = make(connector)
    add(scheduler, "a")
    scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    assert connector.finished == ["a"]
    run_to_end(scheduler, runner)


def test_requests_that_hold_what_they_loaded_do_not_wait_for_each_other_for_ever() -> None:
    """Each loads three blocks of a pool of seven and needs six in all."""
    connector = FakeConnector(hits=dict.fromkeys("ab", (12, True, 2, "ok")))
    scheduler, runner = make(connector, num_blocks=8, caching=False)
    prompts = {name: [ord(name), *range(22)] for name in "ab"}
    for name, prompt in prompts.items():
        add(scheduler, name, prompt)
    tokens, _ = collect(scheduler, runner)
    assert tokens == {name: expected_tokens(prompt, 4) for name, prompt in prompts.items()}
