"""Several sequences for one prompt (`n`). Mirrors vllm/v1/engine/parallel_sampling.py.

The core knows requests of one sequence only: the front end makes n of them, which share the prompt's blocks through the
prefix cache, the first computing them and the others hitting them, in the same step where it fits.
"""

from collections.abc import Sequence

import msgspec

from folovllm.engine.messages import EngineCoreRequest
from folovllm.engine.output_processor import Accumulator, RequestState
from folovllm.outputs import RequestMetrics, RequestOutput

_SEED_LIMIT = 2**63


def fan_out(request: EngineCoreRequest) -> list[EngineCoreRequest]:
    """The requests of one sequence each that `request` stands for: itself when n is 1.

    The i-th is named `<i>_<request id>` and seeded with `seed + i`. Only the first is asked for the log-probabilities
    of the prompt, which are the same for all, and which cost it the prefix cache.
    """
    params = request.sampling_params
    if params.n == 1:
        return [request]
    children = []
    for index in range(params.n):
        own = msgspec.structs.replace(
            params,
            n=1,
            seed=None if params.seed is None else (params.seed + index) % _SEED_LIMIT,
            prompt_logprobs=params.prompt_logprobs if index == 0 else None,
        )
        name = f"{index}_{request.request_id}"
        children.append(msgspec.structs.replace(request, request_id=name, sampling_params=own))
    return children


class ParentRequest:
    """The sequences of one prompt, put together again; of one sequence too. Used by one thread."""

    def __init__(self, request_id: str, states: Sequence[RequestState]) -> None:
        """Collect what the requests of `fan_out` gain, in their order."""
        self.request_id = request_id
        self.states = list(states)
        self._accumulators = [Accumulator(index) for index in range(len(states))]

    @property
    def finished(self) -> bool:
        """Whether the last of every sequence has arrived; it may still be taken."""
        return all(state.finished for state in self.states)

    def take(self) -> RequestOutput | None:
        """The whole request so far, when any sequence gained since the last time; else None.

        Raises:
            EngineDeadError: the core died.
        """
        gained = False
        for state, accumulator in zip(self.states, self._accumulators, strict=True):
            if (delta := state.take()) is not None:
                accumulator.add(delta)
                gained = True
        return self._snapshot() if gained else None

    def _snapshot(self) -> RequestOutput:
        first = self.states[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=first.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=[accumulator.completion for accumulator in self._accumulators],
            num_cached_tokens=first.num_cached_tokens,
            num_external_cached_tokens=first.num_external_cached_tokens,
            metrics=self._metrics(),
            prompt_logprobs=first.prompt_logprobs,
        )

    def _metrics(self) -> RequestMetrics:
        if len(self.states) == 1:
            return self.states[0].metrics
        each = [state.metrics for state in self.states]
        return RequestMetrics(
            arrival_time=min(metrics.arrival_time for metrics in each),
            scheduled_time=min((m.scheduled_time for m in each if m.scheduled_time is not None), default=None),
            first_token_time=min((m.first_token_time for m in each if m.first_token_time is not None), default=None),
            last_token_time=max((m.last_token_time for m in each if m.last_token_time is not None), default=None),
        )
