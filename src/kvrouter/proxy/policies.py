"""Who gets a request: one contract, one class per policy, one table of names.

A policy sees pods that may be asked, and what each has cached of the prompt. It decides and remembers what it needs
for its next decision; sending, retrying and accounting are others' work. Belongs to the event loop's thread.
"""

from __future__ import annotations

import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

from kvrouter.config import ProxyConfig
from kvrouter.errors import ConfigError
from kvrouter.proxy.pods import Pod


@dataclass(frozen=True, slots=True)
class PromptView:
    """What a policy may know of a request.

    Attributes:
        num_tokens: length of the prompt, an estimate if it could not be tokenised.
        credit_tokens: pod -> tokens of the prompt that it need not compute, weighted by tier; absent pods have 0.
    """

    num_tokens: int
    credit_tokens: Mapping[str, float] = field(default_factory=dict)

    def uncached_tokens(self, pod: str) -> float:
        """Tokens that `pod` would have to compute."""
        return max(0.0, self.num_tokens - self.credit_tokens.get(pod, 0.0))


class Policy(ABC):
    """Chooses a pod for a request."""

    needs_scores: ClassVar[bool]
    """Whether `credit_tokens` is read; if not, prompts are not tokenised."""

    @abstractmethod
    def pick(self, prompt: PromptView, pods: Sequence[Pod]) -> Pod:
        """Return one of `pods`, which are never empty and may all be asked."""

    def not_computed(self, prompt: PromptView, pod: Pod) -> None:  # noqa: B027 - most policies need not know
        """A pod that was picked did not compute the prompt: it refused it, or was gone."""


class RoundRobin(Policy):
    """Each pod in turn."""

    needs_scores = False

    def __init__(self, config: ProxyConfig) -> None:
        """Begin with the first pod."""
        self._turns: dict[str, int] = {}
        self._turn = 0

    def pick(self, prompt: PromptView, pods: Sequence[Pod]) -> Pod:
        """Return the pod whose last turn is longest ago; pods may come and go."""
        chosen = min(pods, key=lambda pod: self._turns.get(pod.name, 0))
        self._turn += 1
        self._turns[chosen.name] = self._turn
        return chosen


class KVAware(Policy):
    """The cheapest pod, in tokens to compute.

    cost(pod) = queued prefill tokens + decode_token_cost * running decodes + uncached_token_cost * uncached tokens

    Pods that are no busier than the cheapest, and would compute little more of the prompt than it (an eighth), count as
    equal: a common preamble on one pod must not draw every new prompt there. Among equals the pod wins that was given
    the least new prompt text lately, then chance. So cold prompt families spread over idle pods.
    """

    needs_scores = True

    EQUAL_SHARE: Final = 1 / 8
    PLACED_HALF_LIFE_S: Final = 120.0

    def __init__(
        self, config: ProxyConfig, rng: random.Random | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take the weights of `config`."""
        self._decode_token_cost = config.decode_token_cost
        self._uncached_token_cost = config.uncached_token_cost
        self._rng = rng or random.Random()
        self._clock = clock
        self._placed: dict[str, tuple[float, float]] = {}  # pod -> (tokens, when that was)

    def pick(self, prompt: PromptView, pods: Sequence[Pod]) -> Pod:
        """See the class."""
        load = {pod.name: self._load(pod) for pod in pods}
        uncached = {pod.name: prompt.uncached_tokens(pod.name) for pod in pods}
        best = min(pods, key=lambda pod: load[pod.name] + self._uncached_token_cost * uncached[pod.name])
        little = prompt.num_tokens * self.EQUAL_SHARE
        equals = [
            pod
            for pod in pods
            if load[pod.name] <= load[best.name] and uncached[pod.name] <= uncached[best.name] + little
        ]
        now = self._clock()
        chosen = min(equals, key=lambda pod: (self._placed_tokens(pod.name, now), self._rng.random()))
        self._placed[chosen.name] = (self._placed_tokens(chosen.name, now) + uncached[chosen.name], now)
        return chosen

    def not_computed(self, prompt: PromptView, pod: Pod) -> None:
        """Count the prompt's text as not given to the pod."""
        now = self._clock()
        placed = self._placed_tokens(pod.name, now) - prompt.uncached_tokens(pod.name)
        self._placed[pod.name] = (max(0.0, placed), now)

    def _load(self, pod: Pod) -> float:
        return pod.queued_prefill_tokens + self._decode_token_cost * pod.num_decodes

    def _placed_tokens(self, pod: str, now: float) -> float:
        tokens, when = self._placed.get(pod, (0.0, now))
        return tokens * math.exp2((when - now) / self.PLACED_HALF_LIFE_S)


POLICIES: Final[Mapping[str, Callable[[ProxyConfig], Policy]]] = {"kv_aware": KVAware, "round_robin": RoundRobin}
"""Every policy by the name that `proxyConfig.policy` calls it."""


def make_policy(config: ProxyConfig) -> Policy:
    """Return the policy that `config` names.

    Raises:
        ConfigError: there is no such policy.
    """
    if config.policy not in POLICIES:
        raise ConfigError(f"proxyConfig.policy is one of {', '.join(POLICIES)}, not {config.policy!r}")
    return POLICIES[config.policy](config)
