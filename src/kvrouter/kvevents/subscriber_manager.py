"""Which pods are listened to: adds, changes and removes them at run time.

SubscriberManager ── ZmqSubscriber (1 thread) ── EventPool (N workers, replay threads) ── Index
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, Literal, Self, TypeAlias

from kvrouter.errors import EndpointError, UnknownPodError
from kvrouter.kvblock.base import Index
from kvrouter.kvblock.token_processor import TokenProcessor
from kvrouter.kvevents.adapters import EventMessage, parse_topic
from kvrouter.kvevents.counters import EventCounters
from kvrouter.kvevents.pool import EventPool
from kvrouter.kvevents.recovery import StreamState
from kvrouter.kvevents.worker import StreamId
from kvrouter.kvevents.zmq_subscriber import ZmqSubscriber

logger = logging.getLogger(__name__)

PodState: TypeAlias = Literal["live", "recovering", "degraded"]
"""How far the index can be trusted about a pod: all it knows is true in any state, but in the last two, and for a pod
that came late and has no replay endpoint, the pod may hold more. When a thread of the event path fails, its pods are
cleared and degraded for good."""

_MAX_STREAMS: Final = 4096
"""Streams one endpoint may open by its topics; messages of further ones are counted and dropped."""


@dataclass(frozen=True, slots=True)
class PodEndpoint:
    """Where a pod publishes its events.

    Attributes:
        pod: the name its blocks are recorded under, whatever its topic says.
        model: the name of its model in keys; None takes it from the topic `kv@<pod>@<model>`.
        events_endpoint: ZMQ address to connect to, for example `tcp://10.0.0.1:5557`.
        replay_endpoint: address of its replay socket; without one, a gap costs the pod's blocks.
    """

    pod: str
    model: str | None
    events_endpoint: str
    replay_endpoint: str | None = None


class SubscriberManager:
    """Keeps an index up to date from the events of a changing set of pods; any thread may call it.

    A pod may have several endpoints, one per data-parallel rank. Engines may come later than their pod is added and may
    restart at will: ZMQ reconnects, and a sequence number that goes back drops what the old process held.
    """

    def __init__(
        self,
        index: Index,
        token_processor: TokenProcessor,
        *,
        concurrency: int = 4,
        queue_size: int = 16_384,
        replay_timeout_s: float = 5.0,
        counters: EventCounters | None = None,
    ) -> None:
        """Configure a manager; `start` starts its threads.

        Args:
            index: where events go.
            token_processor: computes the request keys, as it does for prompts.
            concurrency: number of event workers.
            queue_size: messages that may wait for one worker.
            replay_timeout_s: how long one replay may take.
            counters: where events are counted; None makes new ones.

        Raises:
            ConfigError: a number that is not positive.
        """
        self.counters: Final = counters if counters is not None else EventCounters()
        self._pool: Final = EventPool(
            index,
            index.event_applier(token_processor),
            self.counters,
            concurrency=concurrency,
            queue_size=queue_size,
            replay_timeout_s=replay_timeout_s,
        )
        self._subscriber: Final = ZmqSubscriber(self._on_subscriber_failed)
        self._lock: Final = threading.RLock()
        self._endpoints: dict[str, dict[str, PodEndpoint]] = {}  # pod -> events endpoint; protected by _lock

    def start(self) -> None:
        """Start listening; a second call does nothing."""
        self._pool.start()
        self._subscriber.start()

    def close(self) -> None:
        """Stop listening; the index keeps what it holds. A second call does nothing."""
        self._subscriber.close()
        self._pool.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def add(self, endpoint: PodEndpoint) -> None:
        """Listen to an endpoint of a pod; the same endpoint again replaces its model and replay address.

        Raises:
            EndpointError: no valid address, or it belongs to another pod already.
        """
        with self._lock:
            for pod, known in self._endpoints.items():
                if pod != endpoint.pod and endpoint.events_endpoint in known:
                    raise EndpointError(f"{endpoint.events_endpoint!r} belongs to pod {pod!r} already")
            old = self._endpoints.get(endpoint.pod, {}).get(endpoint.events_endpoint)
            if old == endpoint:
                return
            if old is not None:
                siblings = [e for e in self._endpoints[endpoint.pod].values() if e is not old]
                self.remove(endpoint.pod)
                for sibling in siblings:
                    self.add(sibling)
            self._subscriber.add(endpoint.events_endpoint, self._receiver(endpoint))
            self._endpoints.setdefault(endpoint.pod, {})[endpoint.events_endpoint] = endpoint
            if endpoint.model is not None:
                stream = StreamId(endpoint.pod, endpoint.model, endpoint.events_endpoint)
                self._pool.open(stream, endpoint.replay_endpoint)
        logger.info("kv pod added pod=%s endpoint=%s", endpoint.pod, endpoint.events_endpoint)

    def listen(self, address: str, topic_filter: str = "kv@") -> str:
        """Bind an address that pods connect to, and take pod and model from their topics; returns the bound address.

        Raises:
            EndpointError: the address cannot be bound.
        """
        opened: set[StreamId] = set()

        def receive(message: EventMessage | None) -> None:
            if message is None:
                self.counters.add("malformed_message")
                return
            stream = StreamId(*parse_topic(message.topic), source=address)
            if stream not in opened:
                if len(opened) >= _MAX_STREAMS:
                    self.counters.add("too_many_streams", pod=stream.pod)
                    return
                opened.add(stream)
                self._pool.open_later(stream, None)
            self._put(stream, message)

        return self._subscriber.add(address, receive, topic_filter=topic_filter, bind=True)

    def remove(self, pod: str) -> None:
        """Stop listening to a pod and forget its blocks.

        Raises:
            UnknownPodError: no such pod.
        """
        with self._lock:
            if pod not in self._endpoints:
                raise UnknownPodError(pod)
            for events_endpoint in self._endpoints.pop(pod):
                self._subscriber.remove(events_endpoint)
            self._pool.forget(pod)
        logger.info("kv pod removed pod=%s", pod)

    def reset_pod(self, pod: str) -> None:
        """Forget a pod's blocks now: its engine is known to have restarted or died, even if it has said nothing yet.

        Raises:
            UnknownPodError: no such pod.
        """
        if pod not in self.pods():
            raise UnknownPodError(pod)
        self._pool.reset(pod)

    def expire(self, silent_since: float) -> list[str]:
        """Reset the pods not heard since a time of `time.monotonic()`, and return their names.

        Engines say nothing while nothing changes, so this suits fleets with steady traffic only.
        """
        return self._pool.expire(silent_since)

    def state(self, pod: str) -> PodState:
        """Return the state of a pod, the worst of its streams'.

        Raises:
            UnknownPodError: no such pod.
        """
        states = self.states()
        if pod not in states:
            raise UnknownPodError(pod)
        return states[pod]

    def states(self) -> dict[str, PodState]:
        """Return the states of all pods, those that announced themselves included, in the order of their names."""
        with self._lock:
            of_streams = self._pool.states()
            pods = sorted(set(self._endpoints) | set(of_streams))
        if self._subscriber.is_failed:
            return dict.fromkeys(pods, "degraded")
        return {pod: _worst(of_streams.get(pod, ())) for pod in pods}

    def pods(self) -> list[str]:
        """Return the names of the pods listened to, those that announced themselves included."""
        return list(self.states())

    def wait_applied(self, pod: str, seq: int, timeout: float) -> None:
        """Wait until message `seq` of every stream of a pod is in the index.

        Raises:
            DeadlineExceededError: it is not in after `timeout` seconds.
        """
        self._pool.wait_applied(pod, seq, timeout)

    def _receiver(self, endpoint: PodEndpoint) -> Callable[[EventMessage | None], None]:
        """Return what takes the messages of one endpoint."""
        streams: dict[str, StreamId] = {}  # by topic; used by the subscriber's thread alone

        def receive(message: EventMessage | None) -> None:
            if message is None:
                self.counters.add("malformed_message", pod=endpoint.pod)
                return
            stream = streams.get(message.topic)
            if stream is None:
                if len(streams) >= _MAX_STREAMS:
                    self.counters.add("too_many_streams", pod=endpoint.pod)
                    return
                model = endpoint.model if endpoint.model is not None else parse_topic(message.topic)[1]
                stream = streams[message.topic] = StreamId(endpoint.pod, model, endpoint.events_endpoint)
                with self._lock:
                    if self._endpoints.get(endpoint.pod, {}).get(endpoint.events_endpoint) is not endpoint:
                        return  # removed or changed meanwhile: its stream must not come back
                    self._pool.open_later(stream, endpoint.replay_endpoint)
            self._put(stream, message)

        return receive

    def _on_subscriber_failed(self) -> None:
        self.counters.add("subscriber_failed")
        self._pool.fail()

    def _put(self, stream: StreamId, message: EventMessage) -> None:
        if not self._pool.put(stream, message):
            self.counters.add("overflows", pod=stream.pod)


def _worst(states: Collection[StreamState]) -> PodState:
    if StreamState.DEGRADED in states or StreamState.DEGRADED_RECOVERING in states:
        return "degraded"
    return "recovering" if StreamState.RECOVERING in states else "live"
