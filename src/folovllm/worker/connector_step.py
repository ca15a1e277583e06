"""The worker half of a KV connector around one step. Mirrors vllm/v1/worker/kv_connector_model_runner_mixin.py."""

from collections.abc import Callable
from typing import TypeVar

from folovllm.core.kv_connector import KVConnector
from folovllm.core.sched.output import KVConnectorOutput, SchedulerOutput
from folovllm.model_executor.forward_context import ForwardContext

T = TypeVar("T")


def run_with_connector(
    connector: KVConnector, scheduler_output: SchedulerOutput, context: ForwardContext, forward: Callable[[], T]
) -> tuple[T, KVConnectorOutput]:
    """Call the hooks in their order around `forward`, which calls the two per-layer ones; also on steps without tokens.

    Only work enqueued by `forward` may follow: what it returns is trusted only for rows without `invalid_block_ids`.
    """
    connector.bind_connector_metadata(scheduler_output.kv_connector_metadata)
    try:
        connector.start_load_kv(context)
        result = forward()
        connector.wait_for_save()
        sending, recving = connector.get_finished(scheduler_output.finished_req_ids)
        report = KVConnectorOutput(
            finished_sending=sending or set(),
            finished_recving=recving or set(),
            invalid_block_ids=connector.get_block_ids_with_load_errors(),
            kv_connector_stats=connector.get_kv_connector_stats(),
        )
    finally:
        connector.clear_connector_metadata()
    return result, report
