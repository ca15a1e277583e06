"""Offline inference: `LLM(model).generate(prompts)`. Mirrors vllm/entrypoints/llm.py."""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, cast

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.parallel_sampling import ParentRequest
from folovllm.engine.processor import PromptType
from folovllm.errors import InvalidRequestError
from folovllm.metrics.stats import CacheStats
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import SamplingParams
from folovllm.transformers_utils.chat_template import Message

Prompts = PromptType | Sequence[PromptType]
"""One text, the token ids of one prompt, or a list of either."""
Params = SamplingParams | Sequence[SamplingParams] | None
"""Options of all prompts, of each, or the model's own defaults."""
Priorities = int | Sequence[int]
"""Of all prompts, or of each; lower goes first."""


class LLM:
    """A model with its KV cache, in this process. Not thread-safe.

    The engine's step runs inside `generate`; `close` (or leaving a `with` block) releases the model.
    """

    def __init__(self, model: str, **options: Any) -> None:
        """Load a checkpoint: a local directory or a hub id; `options` are the fields of `EngineArgs`.

        Raises:
            ConfigError: an unknown option (with the nearest known name) or a bad value.
            ModelLoadError: the checkpoint cannot be loaded.
        """
        self._engine: LLMEngine | None = LLMEngine.from_engine_args(
            EngineArgs.from_options({"model": model, **options})
        )

    @property
    def llm_engine(self) -> LLMEngine:
        """The engine behind it."""
        if self._engine is None:
            raise InvalidRequestError("this LLM was shut down")
        return self._engine

    def generate(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
        *,
        cache_salt: str | None = None,
        priority: Priorities = 0,
    ) -> list[RequestOutput]:
        """Complete the prompts; results are in their order.

        Prompts share cached prefixes only with others of the same `cache_salt`. `priority`, one for all or one per
        prompt: lower goes first; other than 0 only with `scheduling_policy="priority"`.

        Raises:
            InvalidRequestError: a prompt or an option cannot be served; nothing was computed then.
        """
        engine, requests = self.llm_engine, self._add(prompts, sampling_params, cache_salt, priority)
        try:
            while not all(request.finished for request in requests):
                engine.step()
        finally:
            engine.abort([request for request in requests if not request.finished])
        outputs = [request.take() for request in requests]
        return [output for output in outputs if output is not None]  # each has gained all it has

    def generate_stream(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
        *,
        cache_salt: str | None = None,
        priority: Priorities = 0,
    ) -> Iterator[RequestOutput]:
        """Complete the prompts, yielding a request's whole state each time it gained text or tokens.

        Closing the iterator aborts what is unfinished. Prompts share cached prefixes only within a `cache_salt`;
        `priority` is as for `generate`.

        Raises:
            InvalidRequestError: a prompt or an option cannot be served.
        """
        return self._run(self._add(prompts, sampling_params, cache_salt, priority))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, through the model's chat template.

        Conversations share cached prefixes only with others of the same `cache_salt`.

        Raises:
            InvalidRequestError: the model has no chat template, or it refuses the messages.
        """
        if messages and isinstance(messages[0], dict):
            messages = [cast(Sequence[Message], messages)]
        conversations = cast(Sequence[Sequence[Message]], messages)
        processor, extra = self.llm_engine.processor, chat_template_kwargs or {}
        texts = [processor.render_chat(conversation, **extra) for conversation in conversations]
        # The template wrote the special tokens already, so the tokenizer must not add its own.
        prompts = [processor.tokenize(text, add_special_tokens=False) for text in texts]
        outputs = self.generate(prompts, sampling_params, cache_salt=cache_salt)
        for text, output in zip(texts, outputs, strict=True):
            output.prompt = text
        return outputs

    def get_cache_stats(self) -> CacheStats:
        """The prefix cache as of the last step: hit_rate, cached_blocks, ..."""
        return self.llm_engine.get_cache_stats()

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where no options are given: the model authors' own, from generation_config.json."""
        return SamplingParams.from_options(self.llm_engine.processor.facts.default_sampling)

    def reset_prefix_cache(self, reset_connector: bool = False) -> bool:
        """Drop the device's prefix cache, and the connector's store too when told to; False when it is in use."""
        return self.llm_engine.reset_prefix_cache(reset_connector)

    def shutdown(self) -> None:
        """Release the model and the cache. Idempotent."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()

    close = shutdown

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _add(
        self, prompts: Prompts, params: Params, cache_salt: str | None, priority: Priorities
    ) -> list[ParentRequest]:
        each = _as_list(prompts)
        if params is None:
            params = self.get_default_sampling_params()
        options = [params] * len(each) if isinstance(params, SamplingParams) else list(params)
        if len(options) != len(each):
            raise InvalidRequestError(
                f"{len(options)} sampling params for {len(each)} prompts; give one, or one per prompt"
            )
        priorities = [priority] * len(each) if isinstance(priority, int) else list(priority)
        if len(priorities) != len(each):
            raise InvalidRequestError(
                f"{len(priorities)} priorities for {len(each)} prompts; give one, or one per prompt"
            )
        return self.llm_engine.add_requests(each, options, cache_salt, priorities)

    def _run(self, requests: list[ParentRequest]) -> Iterator[RequestOutput]:
        engine, waiting = self.llm_engine, list(requests)
        try:
            while waiting:
                progressed = False
                for request in list(waiting):
                    output = request.take()
                    if output is None:
                        continue
                    progressed = True
                    if output.finished:
                        waiting.remove(request)
                    yield output
                if not progressed:
                    engine.step()
        finally:
            engine.abort(waiting)


def _as_list(prompts: Prompts) -> list[PromptType]:
    if isinstance(prompts, str):
        return [prompts]
    if all(isinstance(item, int) for item in prompts) and len(prompts) > 0:
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[PromptType], prompts))
