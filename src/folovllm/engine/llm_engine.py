"""The synchronous engine: front end and core in one process and thread. Mirrors vllm/v1/engine/llm_engine.py."""

from collections.abc import Sequence
from pathlib import Path

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.core_client import InprocClient
from folovllm.engine.messages import EngineCoreRequest, SchedulerStats
from folovllm.engine.output_processor import OutputProcessor
from folovllm.engine.parallel_sampling import ParentRequest, fan_out
from folovllm.engine.processor import Limits, Processor, PromptType
from folovllm.metrics.stats import CacheStats
from folovllm.sampling_params import SamplingParams
from folovllm.transformers_utils.model_files import read_model_facts
from folovllm.transformers_utils.tokenizer import Tokenizer


class LLMEngine:
    """Requests in, `step` until their mailboxes have what the caller waits for. Not thread-safe."""

    def __init__(self, client: InprocClient, processor: Processor) -> None:
        self.processor = processor
        self._client = client
        self._outputs = OutputProcessor(processor.tokenizer)
        self._stats = SchedulerStats()

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> "LLMEngine":
        """Load the model.

        Raises:
            ConfigError: an option is out of its range.
            ModelLoadError: the checkpoint cannot be loaded.
        """
        from folovllm.engine.core import EngineCore

        config = args.resolve()
        directory = Path(config.model_config.model)
        tokenizer = None if args.skip_tokenizer_init else Tokenizer.from_checkpoint(directory)
        core = EngineCore(config)
        limits = Limits(config.model_config.context_len, core.pool_tokens)
        processor = Processor(tokenizer, limits, read_model_facts(directory), config.scheduler_config.policy)
        return cls(InprocClient(core), processor)

    def add_requests(
        self,
        prompts: Sequence[PromptType],
        params: Sequence[SamplingParams],
        cache_salt: str | None = None,
        priorities: Sequence[int] | None = None,
    ) -> list[ParentRequest]:
        """Queue the requests of each prompt, `n` of them: all, or none when one is not valid.

        `priorities`: one per prompt, lower goes first; None: 0 for all.

        Raises:
            InvalidRequestError: a prompt or its options cannot be served.
        """
        make, tokenize = self.processor.make_request, self.processor.tokenize
        requests = [
            make(tokenize(prompt), options, cache_salt=cache_salt, priority=priority)
            for prompt, options, priority in zip(prompts, params, priorities or [0] * len(prompts), strict=True)
        ]
        return [
            self._add(request, prompt if isinstance(prompt, str) else None)
            for request, prompt in zip(requests, prompts, strict=True)
        ]

    def step(self) -> None:
        """Compute one step and deliver what it produced."""
        outputs = self._client.step()
        self._stats = outputs.scheduler_stats or self._stats
        self._abort_in_core(self._outputs.process(outputs))

    def abort(self, requests: Sequence[ParentRequest]) -> None:
        """Forget what is still going of these."""
        states = [state for request in requests for state in request.states]
        self._abort_in_core([state.request_id for state in states if self._outputs.abort(state.request_id)])

    def reset_prefix_cache(self, reset_connector: bool = False) -> bool:
        """Drop the device's prefix cache, and the connector's store too when told to; False when it is in use."""
        return self._client.reset_prefix_cache(reset_connector)

    def get_cache_stats(self) -> CacheStats:
        """The prefix cache, as of now when nothing runs, else as of the last step."""
        if not len(self._outputs):
            self.step()  # computes nothing, reports
        return CacheStats.from_scheduler(self._stats)

    def shutdown(self) -> None:
        """Release the model and the cache."""
        self._client.shutdown()

    def _add(self, request: EngineCoreRequest, prompt: str | None) -> ParentRequest:
        states = []
        for child in fan_out(request):
            self._client.add_request(child)
            states.append(self._outputs.add_request(child, prompt))
        return ParentRequest(request.request_id, states)

    def _abort_in_core(self, request_ids: list[str]) -> None:
        if request_ids:
            self._client.abort_requests(request_ids)
