"""Drives a scheduler and a fake runner step by step, with the invariants that hold after each."""

from collections import deque
from dataclasses import dataclass, field

from tests.folovllm.core_fakes import FakeRunner

from folovllm.core.sched.output import SchedulerOutput
from folovllm.core.sched.scheduler import Scheduler
from folovllm.engine.messages import EngineCoreOutput
from folovllm.request import Request, RequestStatus


@dataclass
class Launched:
    """A step in flight."""

    output: SchedulerOutput
    may_be_wrong: bool = False


@dataclass
class Pipeline:
    """As the engine core drives them, with up to `depth` steps in flight.

    A step runs as late as possible, when its result is wanted: so nothing that a later step was given may be needed
    for it, and nothing that was done since it was scheduled may have spoilt it.
    """

    scheduler: Scheduler
    runner: FakeRunner
    depth: int = 1
    in_flight: deque[Launched] = field(default_factory=deque)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self.in_flight)

    def step(self) -> list[EngineCoreOutput]:
        self.launch()
        return self.complete()

    def launch(self) -> None:
        """Fill the pipeline."""
        while len(self.in_flight) < self.depth and self.scheduler.has_work:
            output = self._schedule()
            if self.in_flight and output.is_empty:
                return
            self.in_flight.append(Launched(output))

    def complete(self) -> list[EngineCoreOutput]:
        """Run the oldest step."""
        if not self.in_flight:
            return []
        step = self.in_flight.popleft()
        result = self.runner.execute_model(step.output, may_be_wrong=step.may_be_wrong)
        for request_id in step.output.num_scheduled_tokens:
            table = self.scheduler.kv_cache_manager.get_block_ids(request_id)
            used = self.runner.rows[request_id].block_ids
            assert table[: len(used)] == used, f"{request_id}: a block changed hands under a step in flight"
        report = result.kv_connector_output
        if report is not None and report.invalid_block_ids:
            for later in self.in_flight:
                later.may_be_wrong = True
        outputs = self.scheduler.update_from_output(step.output, result)
        check_invariants(self.scheduler, self.runner)
        return outputs

    def _schedule(self) -> SchedulerOutput:
        scheduler = self.scheduler
        waiting, running = list(scheduler.waiting), list(scheduler.running)
        output = scheduler.schedule()
        config = scheduler.scheduler_config
        assert output.total_num_scheduled_tokens <= config.max_num_batched_tokens
        assert len(scheduler.running) <= config.max_num_seqs
        if config.long_prefill_token_threshold:
            assert max(output.num_scheduled_tokens.values(), default=0) <= config.long_prefill_token_threshold
        check_order(scheduler, self.runner, waiting, running)
        check_invariants(scheduler, self.runner)
        return output


def check_order(scheduler: Scheduler, runner: FakeRunner, waiting: list[Request], running: list[Request]) -> None:
    """What `schedule` did to who waited and ran before, each in the order of the queue.

    Who was admitted has nobody before it who still waits, unless for the connector; who was preempted has nobody behind
    it who still runs; and nobody is admitted in a step that preempts.
    """
    is_priority = scheduler.scheduler_config.policy == "priority"
    for queue in (list(scheduler.waiting), scheduler.running) if is_priority else ():
        assert queue == sorted(queue, key=Request.get_rank)
    put_off = runner.connector.put_off if runner.connector is not None else set()
    could_run = [r for r in waiting if r.status is not RequestStatus.WAITING_FOR_REMOTE_KVS]
    admitted = [request.status is RequestStatus.RUNNING for request in could_run if request.request_id not in put_off]
    assert admitted == sorted(admitted, reverse=True), "one was admitted before another that could run"
    survived = [request.status is RequestStatus.RUNNING for request in running]
    assert survived == sorted(survived, reverse=True), "one was preempted that others should have given way to"
    assert all(survived) or not any(admitted), "one was admitted for another that was preempted"


def check_invariants(scheduler: Scheduler, runner: FakeRunner) -> None:
    manager = scheduler.kv_cache_manager
    owners = scheduler.requests | scheduler.leaving
    manager.check_integrity(owners.keys() | scheduler.transfers.held_request_ids)
    free = manager.block_pool.free_block_queue.get_all_free_blocks()
    queued = [*scheduler.waiting, *scheduler.running]
    assert sorted(r.request_id for r in queued) == sorted(scheduler.requests), "a request is lost or queued twice"
    check_sharing(scheduler, owners)
    if runner.connector is not None:
        busy = runner.connector.busy_blocks()
        assert all(block.block_id not in busy for block in free), "a block is free while a transfer uses it"


def check_sharing(scheduler: Scheduler, owners: dict[str, Request]) -> None:
    """A block is in several tables only as the same block of the same prefix."""
    place: dict[int, tuple[int, bytes | None]] = {}
    for request_id, request in owners.items():
        for index, block_id in enumerate(scheduler.kv_cache_manager.get_block_ids(request_id)):
            block_hash = request.block_hashes[index] if index < len(request.block_hashes) else None
            if block_id not in place:
                place[block_id] = (index, block_hash)
                continue
            assert block_hash is not None, f"{request_id} shares a block that is not full"
            assert place[block_id] == (index, block_hash), f"{request_id} shares a block of another prefix"


def run_step(scheduler: Scheduler, runner: FakeRunner) -> list[EngineCoreOutput]:
    """One step, waited for."""
    return Pipeline(scheduler, runner).step()


def run_to_end(
    scheduler: Scheduler, runner: FakeRunner, max_steps: int = 2000, *, depth: int = 1
) -> dict[str, list[int]]:
    """Run until nothing is left to do; returns the tokens of each request that produced any output."""
    tokens: dict[str, list[int]] = {}
    pipeline = Pipeline(scheduler, runner, depth)
    for _ in range(max_steps):
        if not pipeline.has_work:
            return tokens
        for output in pipeline.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    raise AssertionError(f"not done after {max_steps} steps")
