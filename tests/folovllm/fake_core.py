"""An engine core without a model: for tests in process, and as the main of a core process (`python -m`)."""

import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.folovllm.core_fakes import FakeConnector, FakeRunner

from folovllm.config import EngineConfig
from folovllm.core.kv_connector import KVConnectorRole
from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput
from folovllm.engine import core_proc
from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.core import EngineCore
from folovllm.engine.messages import EngineCoreRequest
from folovllm.executor.abstract import Executor
from folovllm.sampling_params import SamplingParams
from kvblocks.events import BlockStored

BLOCK_SIZE = 4
POISON = 999
"""A prompt token that makes the fake model fail."""

MODEL_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "vocab_size": 1000,
}


class FakeExecutor(Executor):
    """The fake runner as an executor, in a thread of its own."""

    def __init__(self, log: list[str] | None = None) -> None:
        self.runner = FakeRunner(BLOCK_SIZE)
        self.log = log if log is not None else []
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fake-worker")

    def execute_model(self, scheduler_output: SchedulerOutput) -> Future[ModelRunnerOutput]:
        return self._worker.submit(self._run, scheduler_output)

    def shutdown(self) -> None:
        self._worker.shutdown()
        self.log.append("executor")

    def _run(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        if any(POISON in new.prompt_token_ids for new in scheduler_output.scheduled_new_reqs):
            raise RuntimeError("the model met poison")
        return self.runner.execute_model(scheduler_output)


class ConfiguredConnector(FakeConnector):
    """A connector as the engine builds it, by its dotted name."""

    def __init__(self, config: EngineConfig, role: KVConnectorRole) -> None:
        super().__init__(config.cache_config.block_size)
        assert role is KVConnectorRole.SCHEDULER
        self.log: list[str] = []
        self.events: list[BlockStored] = []

    def take_events(self) -> list[BlockStored]:
        events, self.events = self.events, []
        return events

    def shutdown(self) -> None:
        self.log.append("connector")


def write_model(directory: Path) -> str:
    """A checkpoint directory with a config.json and no weights."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MODEL_CONFIG))
    return str(directory)


def make_args(model: str, **options: Any) -> EngineArgs:
    defaults = {"device": "cpu", "block_size": BLOCK_SIZE, "num_kv_blocks": 33, "max_num_batched_tokens": 64}
    return EngineArgs.from_options({"model": model, **defaults, **options})


def make_message(name: str, prompt: list[int], max_tokens: int = 4, **fields: Any) -> EngineCoreRequest:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return EngineCoreRequest(request_id=name, prompt_token_ids=prompt, sampling_params=params, **fields)


def main() -> int:
    """The command line of folovllm.engine.core_proc, around the fake executor."""
    return core_proc.main(load=lambda: lambda args: EngineCore(args.resolve(), FakeExecutor()))


if __name__ == "__main__":
    sys.exit(main())
