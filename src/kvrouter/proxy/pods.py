"""What the proxy knows of each engine: whether it may be asked, which models it serves, and what it is busy with.

A pod's state follows this table, and nothing else changes it:

    state      | health_ok | health_late (n in a row) | unreachable | refused_work (n in a row) | cooled     | worked
    -----------+-----------+--------------------------+-------------+---------------------------+------------+-------
    unknown    | up        | down                     | down *      | -                         | -          | up
    up         | -         | down                     | down *      | open                      | -          | -
    down       | up        | -                        | - *         | -                         | -          | -
    open       | -         | down                     | down *      | -                         | half_open  | up
    half_open  | -         | down                     | down *      | open                      | -          | up

    *  once until it is up again: its process is gone, and its cache with it, so its blocks are forgotten. Then, and not
       when it is back, because the events of the new process may be there before its first health check.

`up` takes requests, `half_open` one at a time, the others none. All of it belongs to the event loop's thread.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvrouter.config import PodConfig, ProxyConfig

logger = logging.getLogger(__name__)


class PodState(enum.Enum):
    """Whether a pod may be asked."""

    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"
    OPEN = "open"
    """Its circuit breaker is open: it is reachable, but its answers were errors."""
    HALF_OPEN = "half_open"
    """One request at a time tries whether it works again."""


class PodEvent(enum.Enum):
    """What happens to a pod."""

    HEALTH_OK = "health_ok"
    HEALTH_LATE = "health_late"
    """So many health checks in a row got no answer in time, or an error."""
    UNREACHABLE = "unreachable"
    """A connection was refused, reset or broken off."""
    REFUSED_WORK = "refused_work"
    """So many answers in a row had a status of 500 or above."""
    COOLED = "cooled"
    WORKED = "worked"


TRANSITIONS: Final = {
    (PodState.UNKNOWN, PodEvent.HEALTH_OK): PodState.UP,
    (PodState.UNKNOWN, PodEvent.HEALTH_LATE): PodState.DOWN,
    (PodState.UNKNOWN, PodEvent.UNREACHABLE): PodState.DOWN,
    (PodState.UNKNOWN, PodEvent.WORKED): PodState.UP,
    (PodState.UP, PodEvent.HEALTH_LATE): PodState.DOWN,
    (PodState.UP, PodEvent.UNREACHABLE): PodState.DOWN,
    (PodState.UP, PodEvent.REFUSED_WORK): PodState.OPEN,
    (PodState.DOWN, PodEvent.HEALTH_OK): PodState.UP,
    (PodState.OPEN, PodEvent.HEALTH_LATE): PodState.DOWN,
    (PodState.OPEN, PodEvent.UNREACHABLE): PodState.DOWN,
    (PodState.OPEN, PodEvent.COOLED): PodState.HALF_OPEN,
    (PodState.OPEN, PodEvent.WORKED): PodState.UP,
    (PodState.HALF_OPEN, PodEvent.HEALTH_LATE): PodState.DOWN,
    (PodState.HALF_OPEN, PodEvent.UNREACHABLE): PodState.DOWN,
    (PodState.HALF_OPEN, PodEvent.REFUSED_WORK): PodState.OPEN,
    (PodState.HALF_OPEN, PodEvent.WORKED): PodState.UP,
}
"""(state, event) -> next state; pairs that are absent change nothing."""


@dataclass(slots=True, eq=False)
class Pod:
    """One engine, as the proxy sees it."""

    config: PodConfig
    state: PodState = PodState.UNKNOWN
    models: tuple[str, ...] = ()
    """Models it serves; the first is the name its blocks are indexed under."""
    queued_prefill_tokens: int = 0
    """Prompt tokens sent to it that it has to compute, of requests without a first byte yet."""
    num_prefills: int = 0
    """Requests without a first byte yet."""
    num_decodes: int = 0
    """Requests whose answer is streaming."""
    is_lost: bool = False
    """Whether it was unreachable since it was up last."""
    late_checks: int = field(default=0, repr=False)
    errors_in_a_row: int = field(default=0, repr=False)
    open_until: float = field(default=0.0, repr=False)

    @property
    def name(self) -> str:
        """Its unique name."""
        return self.config.name

    @property
    def url(self) -> str:
        """Base address without a trailing slash."""
        return self.config.url.rstrip("/")

    @property
    def num_running(self) -> int:
        """Requests it has in hand."""
        return self.num_prefills + self.num_decodes


class InFlight:
    """One request's share in its pod's load: prefill until the first byte, then decode, then nothing."""

    __slots__ = ("_is_decoding", "_pod", "_tokens")

    def __init__(self, pod: Pod, uncached_tokens: int) -> None:
        """Count a request of which `pod` has to compute `uncached_tokens`."""
        self._pod: Pod | None = pod
        self._tokens = uncached_tokens
        self._is_decoding = False
        pod.queued_prefill_tokens += uncached_tokens
        pod.num_prefills += 1

    @property
    def is_prefill(self) -> bool:
        """Whether the request waits for its first byte."""
        return self._pod is not None and not self._is_decoding

    def first_byte(self) -> None:
        """The prefill is done. Idempotent."""
        if self._pod is None or self._is_decoding:
            return
        self._is_decoding = True
        self._pod.queued_prefill_tokens -= self._tokens
        self._pod.num_prefills -= 1
        self._pod.num_decodes += 1

    def done(self) -> None:
        """The request has ended, however it did. Idempotent."""
        if self._pod is None:
            return
        self.first_byte()
        self._pod.num_decodes -= 1
        self._pod = None


class PodRegistry:
    """All pods, and the events that move them through the table above."""

    def __init__(
        self,
        pods: Iterable[PodConfig],
        config: ProxyConfig,
        *,
        on_lost: Callable[[str], None] = lambda pod: None,
        on_model: Callable[[str, str], None] = lambda pod, model: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Register pods, all of unknown state.

        Args:
            pods: the fleet; names are unique.
            config: thresholds.
            on_lost: called with a pod's name when its process is gone, and what it had cached.
            on_model: called with a pod's name and the model its blocks are indexed under, when that is learnt.
            clock: seconds.
        """
        self._config = config
        self._on_lost = on_lost
        self._on_model = on_model
        self._clock = clock
        self._pods = {pod.name: Pod(pod, models=(pod.model,) if pod.model else ()) for pod in pods}

    def __getitem__(self, name: str) -> Pod:
        """Return the pod of this name; KeyError if there is none."""
        return self._pods[name]

    @property
    def pods(self) -> Sequence[Pod]:
        """All pods, in the order given."""
        return list(self._pods.values())

    def models(self) -> list[str]:
        """Every model that some pod, up or not, is known to serve."""
        return list(dict.fromkeys(model for pod in self._pods.values() for model in pod.models))

    def candidates(self, model: str, exclude: Iterable[str] = ()) -> list[Pod]:
        """Return the pods that serve `model` and may be asked now, without those named in `exclude`."""
        excluded = frozenset(exclude)
        return [
            pod
            for pod in self._pods.values()
            if model in pod.models and pod.name not in excluded and self._may_be_asked(pod)
        ]

    def health_ok(self, pod: Pod, models: Sequence[str] | None = None) -> None:
        """It answered a health check; `models` is what it says it serves, if it was asked."""
        pod.late_checks = 0
        if models:
            is_news = models[0] not in pod.models[:1]
            pod.models = tuple(models)
            if is_news:
                self._on_model(pod.name, models[0])
        self._apply(pod, PodEvent.HEALTH_OK)

    def health_late(self, pod: Pod) -> None:
        """A health check got no answer in time, or an error."""
        pod.late_checks += 1
        if pod.late_checks >= self._config.health_failures:
            self._apply(pod, PodEvent.HEALTH_LATE)

    def unreachable(self, pod: Pod) -> None:
        """A connection to it was refused, reset or broken off."""
        self._apply(pod, PodEvent.UNREACHABLE)
        if not pod.is_lost:
            pod.is_lost = True
            self._on_lost(pod.name)

    def answered(self, pod: Pod, status: int) -> None:
        """It answered a request with this HTTP status."""
        if status < 500:
            pod.errors_in_a_row = 0
            self._apply(pod, PodEvent.WORKED)
            return
        pod.errors_in_a_row += 1
        if pod.errors_in_a_row >= self._config.breaker_failures or pod.state is PodState.HALF_OPEN:
            self._apply(pod, PodEvent.REFUSED_WORK)

    def _may_be_asked(self, pod: Pod) -> bool:
        if pod.state is PodState.OPEN and self._clock() >= pod.open_until:
            self._apply(pod, PodEvent.COOLED)
        return pod.state is PodState.UP or (pod.state is PodState.HALF_OPEN and pod.num_running == 0)

    def _apply(self, pod: Pod, event: PodEvent) -> None:
        before = pod.state
        after = TRANSITIONS.get((before, event), before)
        if after is before:
            return
        pod.state = after
        level = logging.INFO if after in (PodState.UP, PodState.HALF_OPEN) else logging.WARNING
        logger.log(level, "pod=%s state=%s was=%s event=%s", pod.name, after.value, before.value, event.value)
        if after is PodState.OPEN:
            pod.open_until = self._clock() + self._config.breaker_cooldown
        if after is PodState.UP:
            pod.errors_in_a_row = 0
            pod.is_lost = False
