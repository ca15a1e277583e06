"""Who goes first, who gives way, and how much of a long prompt a step may take."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.folovllm.core_fakes import FakeRunner, expected_tokens, make_request, make_scheduler
from tests.folovllm.scheduler_driver import Pipeline, run_step, run_to_end

from folovllm.core.sched.request_queue import PriorityRequestQueue
from folovllm.core.sched.scheduler import Scheduler
from folovllm.errors import InvalidRequestError
from folovllm.request import Request


def add(scheduler: Scheduler, name: str, prompt: list[int], **options: object) -> None:
    scheduler.add_request(make_request(name, prompt, **options))  # type: ignore[arg-type]


def prompt_of(seed: int, length: int) -> list[int]:
    return [seed * 100 + i for i in range(length)]


# -- priorities -------------------------------------------------------------------------------------------------------
def test_lower_priority_value_goes_first_then_arrival_then_id() -> None:
    scheduler, runner = make_scheduler(policy="priority", max_num_seqs=1), FakeRunner()
    add(scheduler, "late", [1], priority=1, arrival_time=3.0, max_tokens=1)
    add(scheduler, "b", [2], priority=1, arrival_time=2.0, max_tokens=1)
    add(scheduler, "a", [3], priority=1, arrival_time=2.0, max_tokens=1)
    add(scheduler, "urgent", [4], priority=-5, arrival_time=9.0, max_tokens=1)
    assert list(run_to_end(scheduler, runner)) == ["urgent", "a", "b", "late"]


def test_request_in_progress_is_not_displaced_by_one_that_only_waits_for_a_seat() -> None:
    scheduler, runner = make_scheduler(policy="priority", max_num_seqs=1), FakeRunner()
    add(scheduler, "first", [1], priority=5, max_tokens=3)
    run_step(scheduler, runner)
    add(scheduler, "urgent", [2], priority=0, max_tokens=1)
    run_step(scheduler, runner)
    assert [r.request_id for r in scheduler.running] == ["first"]
    assert list(run_to_end(scheduler, runner)) == ["first", "urgent"]


@pytest.mark.parametrize("depth", [1, 2])
def test_lowest_of_all_gives_way_though_it_came_first(depth: int) -> None:
    scheduler, runner = make_scheduler(num_blocks=7, caching=False, policy="priority"), FakeRunner()
    add(scheduler, "low", prompt_of(0, 5), priority=2, max_tokens=8)
    add(scheduler, "mid", prompt_of(1, 5), priority=1, max_tokens=8)
    pipeline = Pipeline(scheduler, runner, depth)
    pipeline.step()
    add(scheduler, "high", prompt_of(2, 5), priority=0, max_tokens=8)
    preempted: list[str] = []
    tokens: dict[str, list[int]] = {
        "low": expected_tokens(prompt_of(0, 5), 1),
        "mid": expected_tokens(prompt_of(1, 5), 1),
    }
    while pipeline.has_work:
        pipeline.launch()
        preempted += [name for step in pipeline.in_flight for name in sorted(step.output.preempted_req_ids)]
        for output in pipeline.complete():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    assert preempted[0] == "low"
    assert "high" not in preempted
    assert tokens == {name: expected_tokens(prompt_of(i, 5), 8) for i, name in enumerate(("low", "mid", "high"))}


def test_preempted_request_waits_in_the_place_of_its_rank() -> None:
    scheduler, runner = make_scheduler(num_blocks=5, caching=False, policy="priority"), FakeRunner()
    add(scheduler, "a", prompt_of(1, 8), priority=1, max_tokens=6)
    add(scheduler, "b", prompt_of(2, 7), priority=3, max_tokens=6)
    run_step(scheduler, runner)
    add(scheduler, "c", prompt_of(3, 8), priority=2, max_tokens=1)
    run_step(scheduler, runner)
    assert [r.request_id for r in scheduler.waiting] == ["c", "b"]


def test_budget_goes_to_the_higher_first_though_it_was_admitted_last() -> None:
    scheduler, runner = make_scheduler(policy="priority", budget=8, threshold=4), FakeRunner()
    add(scheduler, "low", prompt_of(1, 30), priority=1)
    run_step(scheduler, runner)
    for name in ("high", "higher"):
        add(scheduler, name, prompt_of(len(name), 9), priority=-len(name))
    assert scheduler.schedule().num_scheduled_tokens == {"low": 4, "higher": 4}, "who runs comes before who waits"
    assert scheduler.schedule().num_scheduled_tokens == {"higher": 4, "low": 4}


def test_first_come_first_served_refuses_priorities_by_name() -> None:
    scheduler = make_scheduler()
    with pytest.raises(InvalidRequestError, match=r"'a' has priority=1; .*'fcfs'.* need 'priority'"):
        add(scheduler, "a", [1], priority=1)
    assert not scheduler.has_work


class PriorityQueueMachine(RuleBasedStateMachine):
    """PriorityRequestQueue against a sorted list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = PriorityRequestQueue()
        self.model: list[Request] = []
        self.taken: list[Request] = []
        self.count = 0

    @rule(priority=st.integers(-2, 2), arrival=st.integers(0, 3), prepend=st.booleans())
    def add(self, priority: int, arrival: int, prepend: bool) -> None:
        self.count += 1
        request = make_request(f"r{self.count}", [1], priority=priority, arrival_time=float(arrival))
        if prepend:
            self.queue.prepend_requests([request])
        else:
            self.queue.add_request(request)
        self.model.append(request)

    @rule(data=st.data())
    @precondition(lambda self: self.taken)
    def put_back(self, data: st.DataObject) -> None:
        request = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.queue.prepend_requests([request])
        self.model.append(request)

    @rule()
    @precondition(lambda self: self.model)
    def pop(self) -> None:
        request = min(self.model, key=Request.get_rank)
        assert self.queue.peek_request() is request
        assert self.queue.pop_request() is request
        self.model.remove(request)
        self.taken.append(request)

    @rule(data=st.data())
    @precondition(lambda self: self.model)
    def remove(self, data: st.DataObject) -> None:
        request = self.model.pop(data.draw(st.integers(0, len(self.model) - 1)))
        self.queue.remove_request(request)
        self.taken.append(request)

    @invariant()
    def agrees(self) -> None:
        assert list(self.queue) == sorted(self.model, key=Request.get_rank)
        assert len(self.queue) == len(self.model)


TestPriorityQueue = PriorityQueueMachine.TestCase
TestPriorityQueue.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_queue_forgets_what_was_removed() -> None:
    queue = PriorityRequestQueue()
    requests = [make_request(f"r{i}", [1], priority=i) for i in range(1000)]
    for request in requests:
        queue.add_request(request)
    for request in requests[1:]:
        queue.remove_request(request)
    assert list(queue) == requests[:1]
    assert len(queue._heap) < 100, "the dead stay in the majority"


# -- long prefills ----------------------------------------------------------------------------------------------------
def test_threshold_caps_waiting_and_running_alike_and_leaves_room_for_others() -> None:
    scheduler, runner = make_scheduler(budget=20, threshold=6), FakeRunner()
    add(scheduler, "long", prompt_of(1, 15), max_tokens=2)
    add(scheduler, "short", prompt_of(2, 5), max_tokens=4)
    scheduled = []
    for _ in range(3):
        output = scheduler.schedule()
        scheduled.append(output.num_scheduled_tokens)
        scheduler.update_from_output(output, runner.execute_model(output))
    assert scheduled == [{"long": 6, "short": 5}, {"long": 6, "short": 1}, {"long": 3, "short": 1}]
    tokens = run_to_end(scheduler, runner)
    assert tokens == {
        "long": expected_tokens(prompt_of(1, 15), 2)[1:],
        "short": expected_tokens(prompt_of(2, 5), 4)[3:],
    }


def test_threshold_above_what_is_left_changes_nothing() -> None:
    scheduler = make_scheduler(budget=20, threshold=16)
    add(scheduler, "a", prompt_of(1, 15))
    assert scheduler.schedule().num_scheduled_tokens == {"a": 15}
