"""The engine core: scheduler, executor, KV events, one step at a time. Mirrors vllm/v1/engine/core.py.

    step: schedule -> execute_model -> update_from_output -> publish the step's KV events

With asynchronous scheduling two steps are in flight, so that the model need not wait for the host (vLLM's
`step_with_batch_queue`):

    engine core's thread   schedule 1, 2 | update 1, schedule 3 | update 2, schedule 4 | ...
    worker's thread                 run 1              run 2                run 3

In process it is driven by its caller; `engine/core_proc.py` drives it in a process of its own.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, wait

from folovllm.config import EngineConfig, KVEventsConfig
from folovllm.core.kv_cache_utils import get_request_block_hasher
from folovllm.core.kv_connector import KVConnectorRole, create_connector
from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput
from folovllm.core.sched.scheduler import Scheduler
from folovllm.engine.messages import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from folovllm.errors import ConfigError
from folovllm.executor.abstract import Executor
from folovllm.executor.factory import create_executor
from folovllm.request import BlockHashFn, Request, RequestStatus
from kvblocks.events import KVEventBatch
from kvblocks.hashing import BlockHasher
from kvblocks.publisher import EventPublisher, NullEventPublisher, ZmqEventPublisher

logger = logging.getLogger(__name__)

_TRANSFER_POLL_S = 0.001
_RESET_TIMEOUT_S = 5.0
_ABANDON_TIMEOUT_S = 10.0


class EngineCore:
    """Owns everything that computes; used by one thread."""

    def __init__(self, config: EngineConfig, executor: Executor | None = None) -> None:
        """Load the model (unless an executor that has one is given), then build the scheduler.

        Raises:
            ModelLoadError: the checkpoint is unusable.
            ConfigError: an option is not possible here.
            kvblocks.errors.PublisherError: the events' endpoint cannot be opened.
        """
        _check_options(config)
        self.config = config
        # In flight, the oldest first.
        self._steps: deque[tuple[SchedulerOutput, Future[ModelRunnerOutput]]] = deque()
        self._max_steps = 2 if config.scheduler_config.async_scheduling else 1
        with contextlib.ExitStack() as built:
            # First what may fail quickly: a port in use.
            self._publisher = _make_publisher(config.kv_events_config, config.parallel_config.data_parallel_rank)
            built.callback(self._publisher.close)
            self._publisher.start()
            # Before the connector's scheduler half: its worker half registers the KV tensors.
            self.executor = executor if executor is not None else create_executor(config)
            built.callback(self.executor.shutdown)
            self.config = config = self.executor.config or config
            transfer = config.kv_transfer_config
            self.connector = create_connector(config, KVConnectorRole.SCHEDULER) if transfer is not None else None
            if self.connector is not None:
                built.callback(self.connector.shutdown)  # while the workers can still end its transfers
            built.callback(self._abandon_steps)
            # Kept for `shutdown`, in reverse order; a failure above has released what was built so far.
            self._resources = built.pop_all()
        has_events = config.kv_events_config is not None and config.kv_events_config.enable_kv_cache_events
        self.scheduler = Scheduler(
            config.scheduler_config,
            config.cache_config,
            config.model_config.max_model_len,
            connector=self.connector,
            kv_load_failure_policy=transfer.kv_load_failure_policy if transfer is not None else "recompute",
            enable_kv_cache_events=has_events,
        )
        self._block_hash_fn = self._make_block_hash_fn()
        # Outputs of steps that `reset_prefix_cache` ran; they leave with the next step.
        self._kept_outputs: list[EngineCoreOutput] = []
        # Never set: a step that could only poll for transfers waits on it.
        self._pause = threading.Event()

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do; false again once the runner knows who finished and transfers ended."""
        return self.scheduler.has_work or bool(self._steps or self._kept_outputs)

    @property
    def pool_tokens(self) -> int:
        """The longest request, prompt and output, that the KV pool can ever hold; longer ones end with "error"."""
        return self.scheduler.capacity_tokens

    def add_request(self, request: EngineCoreRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: its id is in use, or it has a priority that the scheduling policy does not heed.
        """
        while self._steps and request.request_id in self.scheduler.leaving:
            # Its caller has had all output of the request that had this id before.
            self._kept_outputs += self._complete_step()
        self.scheduler.add_request(Request(request, self._block_hash_fn))

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """Forget these, whatever they are doing; they produce no more output. Unknown ids are ignored."""
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def step(self) -> EngineCoreOutputs:
        """Compute one step; without tokens to compute it still runs the connector's hooks.

        With asynchronous scheduling it waits for the oldest step in flight, after it has launched the next one.
        """
        outputs, self._kept_outputs = self._kept_outputs, []
        if self.scheduler.has_work or self._steps:
            outputs += self._step()
        return EngineCoreOutputs(outputs=outputs, scheduler_stats=self.scheduler.make_stats())

    def reset_prefix_cache(self, reset_connector: bool = False) -> bool:
        """Drop the device's reusable content, and with `reset_connector` that of the store behind it.

        Refused (False) while requests run. Steps in flight are waited for, and transfers of finished requests, these
        for a few seconds.
        """
        self._drain()
        deadline = time.monotonic() + _RESET_TIMEOUT_S
        while not self.scheduler.has_unfinished_requests and self.scheduler.has_work and time.monotonic() < deadline:
            self._kept_outputs += self._step()
        self._drain()
        store_remains = self.connector is not None and not reset_connector
        if not self.scheduler.kv_cache_manager.reset_prefix_cache(other_tiers_remain=store_remains):
            return False
        is_reset = True
        if reset_connector and self.connector is not None:
            is_reset = self.connector.reset_cache() is not False
        self._publish_events()
        return is_reset

    def shutdown(self) -> None:
        """Release everything; idempotent."""
        self._resources.close()

    def _step(self) -> list[EngineCoreOutput]:
        """Fill the pipeline, so that the worker has something to do, and wait for the oldest step."""
        while len(self._steps) < self._max_steps and self.scheduler.has_work:
            scheduler_output = self.scheduler.schedule()
            if self._steps and scheduler_output.is_empty:
                break  # all that is left to do waits for the steps in flight
            self._steps.append((scheduler_output, self.executor.execute_model(scheduler_output)))
        return self._complete_step()

    def _drain(self) -> None:
        """Wait for all steps in flight."""
        while self._steps:
            self._kept_outputs += self._complete_step()

    def _complete_step(self) -> list[EngineCoreOutput]:
        """Wait for the oldest step in flight; the front end notices one that never ends, and ends the core."""
        scheduler_output, result = self._steps.popleft()
        outputs = self.scheduler.update_from_output(scheduler_output, result.result())
        self._publish_events()
        if not scheduler_output.total_num_scheduled_tokens and self.scheduler.has_pending_transfers:
            # All there is to do is to wait for the connector, whose contract has no way to be told but to ask.
            self._pause.wait(_TRANSFER_POLL_S)
        return outputs

    def _abandon_steps(self) -> None:
        """Let the steps in flight end, whose results nobody wants, before what they use is released."""
        results = [result for _, result in self._steps]
        self._steps.clear()
        wait(results, timeout=_ABANDON_TIMEOUT_S)

    def _make_block_hash_fn(self) -> BlockHashFn | None:
        cache = self.config.cache_config
        if not cache.enable_prefix_caching and self.connector is None:
            return None
        return get_request_block_hasher(BlockHasher(cache.prefix_caching_hash_algo, block_size=cache.block_size))

    def _publish_events(self) -> None:
        events = self.scheduler.kv_cache_manager.take_events()
        if self.connector is not None:
            events.extend(self.connector.take_events())
        if events:
            rank = self.config.parallel_config.data_parallel_rank
            self._publisher.publish(KVEventBatch(ts=time.time(), events=events, data_parallel_rank=rank))


def _check_options(config: EngineConfig) -> None:
    """Before the model is loaded."""
    scheduler = config.scheduler_config
    if scheduler.long_prefill_token_threshold and not scheduler.enable_chunked_prefill:
        raise ConfigError(
            f"long_prefill_token_threshold={scheduler.long_prefill_token_threshold} needs enable_chunked_prefill=True: "
            "without it a prompt is computed in one step; leave the threshold at 0"
        )


def _make_publisher(config: KVEventsConfig | None, data_parallel_rank: int) -> EventPublisher:
    if config is None or not config.enable_kv_cache_events or config.publisher == "null":
        return NullEventPublisher()
    return ZmqEventPublisher(
        config.endpoint,
        config.replay_endpoint,
        config.topic,
        buffer_steps=config.buffer_steps,
        hwm=config.hwm,
        max_queue_size=config.max_queue_size,
        data_parallel_rank=data_parallel_rank,
    )
