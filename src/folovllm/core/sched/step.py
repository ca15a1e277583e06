"""A step while it is put together, and what is remembered of it until its result is in.

vLLM keeps the first in local variables of `Scheduler.schedule`, the second in counters of the request.
"""

from dataclasses import dataclass, field

from folovllm.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from folovllm.request import Request


@dataclass(slots=True)
class StepBuilder:
    """What has been scheduled so far in this step."""

    token_budget: int
    """Tokens that may still be scheduled."""
    requests: list[Request] = field(default_factory=list)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    new: list[NewRequestData] = field(default_factory=list)
    cached: list[CachedRequestData] = field(default_factory=list)
    is_short_of_room: bool = False
    """A running request found no block: nobody is admitted in this step."""

    def add(self, request: Request, num_tokens: int, news: NewRequestData | CachedRequestData | None = None) -> None:
        """Compute the request's next `num_tokens` tokens, of which there are so many in the budget."""
        if isinstance(news, CachedRequestData):
            self.cached.append(news)
        elif news is not None:
            self.new.append(news)
        self.requests.append(request)
        self.num_scheduled_tokens[request.request_id] = num_tokens
        self.token_budget -= num_tokens

    def build(self, finished_req_ids: set[str], preempted_req_ids: set[str]) -> SchedulerOutput:
        """The step as the model runner takes it."""
        return SchedulerOutput(
            scheduled_new_reqs=self.new,
            scheduled_cached_reqs=self.cached,
            num_scheduled_tokens=self.num_scheduled_tokens,
            total_num_scheduled_tokens=sum(self.num_scheduled_tokens.values()),
            finished_req_ids=finished_req_ids,
            preempted_req_ids=preempted_req_ids,
        )


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step with tokens whose result is not in yet."""

    output: SchedulerOutput
    requests: list[Request]
    sampling: list[Request]
    """Those whose last known token, or the one that the step before samples, is computed: each yields one token."""

    @classmethod
    def launch(cls, output: SchedulerOutput, requests: list[Request]) -> "StepInFlight":
        """Count the step's tokens as computed from here on, and the tokens it will sample as on their way."""
        sampling = []
        for request, num_tokens in zip(requests, output.num_scheduled_tokens.values(), strict=True):
            request.num_computed_tokens += num_tokens
            request.num_steps_in_flight += 1
            if request.num_computed_tokens == request.num_tokens_with_placeholders:
                request.num_output_placeholders += 1
                sampling.append(request)
        return cls(output, requests, sampling)

    def land(self) -> None:
        """The result is in."""
        for request in self.requests:
            request.num_steps_in_flight -= 1
