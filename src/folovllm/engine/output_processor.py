"""From what the core produced to what each caller reads. Mirrors vllm/v1/engine/output_processor.py.

The processor puts into a request's mailbox, its caller takes out. The mailbox holds one delta: what arrives while the
caller is busy is merged into it, so a slow caller costs no more memory than the text itself.
"""

import time
from collections.abc import Callable

import msgspec

from folovllm.engine.detokenizer import IncrementalDetokenizer
from folovllm.engine.logprobs import to_position_logprobs
from folovllm.engine.messages import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from folovllm.metrics.stats import EngineMetrics, RequestFacts
from folovllm.outputs import CompletionOutput, PositionLogprobs, RequestMetrics
from folovllm.transformers_utils.tokenizer import Tokenizer


class RequestDelta(msgspec.Struct, gc=False):
    """What one request gained since its caller last looked. One per token: made in a third of a dataclass's time."""

    text: str = ""
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[PositionLogprobs] | None = None
    """One entry per token of `token_ids`, when the request asked for them."""

    def merge(self, later: "RequestDelta") -> None:
        """Append what came after."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs


class RequestState:
    """One request between its arrival and its last delta, with its mailbox. Used by one thread."""

    def __init__(self, request: EngineCoreRequest, prompt: str | None = None, tokenizer: Tokenizer | None = None):
        self.request_id = request.request_id
        self.prompt = prompt
        self.prompt_token_ids = request.prompt_token_ids
        self.num_cached_tokens = 0
        self.num_external_cached_tokens = 0
        self.num_output_tokens = 0
        self.num_preemptions = 0
        self.max_tokens = request.sampling_params.max_tokens
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        """There with the first delta, when the request asked for them."""
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.on_ready: Callable[[], None] = _nothing
        """Called after something was put into the mailbox."""
        self._eos_token_ids = request.eos_token_ids
        self._tokenizer = tokenizer
        self._detokenizer = None
        if tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer.create(
                tokenizer, request.sampling_params, request.prompt_token_ids
            )
        self._mailbox: RequestDelta | None = None
        self._error: Exception | None = None
        self.finished = False
        """Whether its last delta was put into the mailbox."""

    def add(self, output: EngineCoreOutput) -> RequestDelta:
        """Detokenise one step's output and put it into the mailbox; returns what was put there."""
        if self.num_output_tokens == 0:
            self.num_cached_tokens = output.num_cached_tokens
            self.num_external_cached_tokens = output.num_external_cached_tokens
            self.metrics.scheduled_time = output.scheduled_time or None
        if output.new_prompt_logprobs is not None:
            self.prompt_logprobs = [None, *to_position_logprobs(output.new_prompt_logprobs, self._tokenizer)]
        self.num_preemptions = output.num_preemptions
        delta = self._detokenize(output)
        self.num_output_tokens += len(delta.token_ids)
        if self._mailbox is None:
            self._mailbox = delta
        else:
            self._mailbox.merge(delta)
        self.finished = delta.finish_reason is not None
        self.on_ready()
        return delta

    def fail(self, error: Exception) -> None:
        """Make the caller's next `take` raise `error`, once it has taken what arrived before."""
        self._error = error
        self.on_ready()

    def take(self) -> RequestDelta | None:
        """Empty the mailbox; None when nothing arrived.

        Raises:
            EngineDeadError: the core died.
        """
        if self._mailbox is None and self._error is not None:
            raise self._error
        delta, self._mailbox = self._mailbox, None
        return delta

    def _detokenize(self, output: EngineCoreOutput) -> RequestDelta:
        delta = RequestDelta("", list(output.new_token_ids), output.finish_reason, output.stop_reason)
        if output.new_logprobs is not None:
            delta.logprobs = to_position_logprobs(output.new_logprobs, self._tokenizer)
        if self._detokenizer is None:
            return delta
        shown = delta.token_ids[:-1] if self._ended_by_token(output) else delta.token_ids
        for index, token_id in enumerate(shown):
            text, stop = self._detokenizer.update(token_id)
            delta.text += text
            if stop is not None:
                delta.token_ids = delta.token_ids[: index + 1]
                if delta.logprobs is not None:
                    delta.logprobs = delta.logprobs[: index + 1]
                delta.finish_reason, delta.stop_reason = "stop", stop
                return delta
        if output.finish_reason is not None:
            delta.text += self._detokenizer.finish()
        return delta

    def _ended_by_token(self, output: EngineCoreOutput) -> bool:
        """Whether the last token is an end of sequence or a stop token: such a one is no part of the text.

        A request whose grammar has come to its end ends with a token like any other.
        """
        if output.finish_reason != "stop" or not output.new_token_ids:
            return False
        return output.stop_reason is not None or output.new_token_ids[-1] in self._eos_token_ids


class Accumulator:
    """Adds deltas up to the sequence so far, for callers who want all of it each time."""

    def __init__(self, index: int = 0) -> None:
        """`index` is that of the sequence among those of its prompt."""
        self.completion = CompletionOutput(index=index, text="", token_ids=[])

    def add(self, delta: RequestDelta) -> CompletionOutput:
        """A new completion with `delta` appended; earlier ones stay as they were."""
        before = self.completion
        logprobs, total = before.logprobs, before.cumulative_logprob
        if delta.logprobs is not None:
            logprobs = (logprobs or []) + delta.logprobs
            chosen = zip(delta.token_ids, delta.logprobs, strict=True)
            total = (total or 0.0) + sum(position[token].logprob for token, position in chosen)
        self.completion = CompletionOutput(
            index=before.index,
            text=before.text + delta.text,
            token_ids=before.token_ids + delta.token_ids,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            logprobs=logprobs,
            cumulative_logprob=total,
        )
        return self.completion


class OutputProcessor:
    """All requests in flight of one front end. Used by one thread."""

    def __init__(self, tokenizer: Tokenizer | None, metrics: EngineMetrics | None = None) -> None:
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._states: dict[str, RequestState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def add_request(self, request: EngineCoreRequest, prompt: str | None = None) -> RequestState:
        """Start to follow a request; to be called before the core's outputs are processed."""
        state = RequestState(request, prompt, self._tokenizer)
        self._states[request.request_id] = state
        return state

    def process(self, outputs: EngineCoreOutputs) -> list[str]:
        """Hand a step's outputs to their requests.

        Returns:
            Ids of requests that ended here, by a stop string, while the core goes on: it must be told to abort them.
        """
        now = time.monotonic()
        to_abort = []
        num_tokens = 0
        for output in outputs.outputs:
            state = self._states.get(output.request_id)
            if state is None:  # aborted in the meantime
                continue
            delta = state.add(output)
            num_tokens += self._observe(state, delta, now)
            if delta.finish_reason is not None:
                del self._states[state.request_id]
                if output.finish_reason is None:
                    to_abort.append(state.request_id)
        if self._metrics is not None:
            self._metrics.observe_step(outputs.scheduler_stats, num_tokens)
        return to_abort

    def abort(self, request_id: str) -> bool:
        """Stop to follow a request whose caller has left; returns whether it was still going."""
        if self._states.pop(request_id, None) is None:
            return False
        if self._metrics is not None:
            self._metrics.observe_finish("abort")
        return True

    def fail_all(self, error: Exception) -> None:
        """The core is gone: give the error to every caller that waits."""
        states, self._states = self._states, {}
        for state in states.values():
            state.fail(error)
            if self._metrics is not None:
                self._metrics.observe_finish("error")

    def _observe(self, state: RequestState, delta: RequestDelta, now: float) -> int:
        """Note times; returns the tokens that the step computed for this request, as far as they are known here."""
        metrics, times = self._metrics, state.metrics
        num_tokens = len(delta.token_ids)
        if num_tokens:
            previous, times.last_token_time = times.last_token_time, now
            if metrics is not None:
                metrics.observe_tokens(num_tokens, None if previous is None else now - previous)
            if previous is None:
                times.first_token_time = now
                num_tokens += len(state.prompt_token_ids)
                if metrics is not None:
                    metrics.observe_first_token(_facts(state), now - times.arrival_time)
        if delta.finish_reason is not None and metrics is not None:
            metrics.observe_finish(delta.finish_reason, _facts(state), times, now)
        return num_tokens


def _facts(state: RequestState) -> RequestFacts:
    return RequestFacts(
        num_prompt_tokens=len(state.prompt_token_ids),
        num_cached_tokens=state.num_cached_tokens,
        num_external_cached_tokens=state.num_external_cached_tokens,
        num_generation_tokens=state.num_output_tokens,
        max_tokens=state.max_tokens,
        num_preemptions=state.num_preemptions,
    )


def _nothing() -> None:
    pass
