"""The order in which waiting requests are admitted. Mirrors vllm/v1/core/sched/request_queue.py."""

import heapq
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from folovllm.config import SchedulingPolicy
from folovllm.request import Request

Rank = tuple[int, float, str]

_MIN_DEAD = 32  # entries that no rebuild is worth


class RequestQueue(Protocol):
    """Waiting requests; iterates in the order of admission."""

    def add_request(self, request: Request) -> None:
        """Queue a newcomer."""

    def peek_request(self) -> Request:
        """The request to admit next. REQUIRES: not empty."""

    def pop_request(self) -> Request:
        """Take it out. REQUIRES: not empty."""

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put requests back, in this order, before all others of their rank."""

    def remove_request(self, request: Request) -> None:
        """Take out any request. REQUIRES: it is queued."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...


class FCFSRequestQueue:
    """First come, first served; one that was preempted came earlier than all that wait."""

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()

    def add_request(self, request: Request) -> None:
        """Queue a newcomer at the end."""
        self._requests.append(request)

    def peek_request(self) -> Request:
        """The first."""
        return self._requests[0]

    def pop_request(self) -> Request:
        """Take out the first."""
        return self._requests.popleft()

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put requests, in this order, before all others."""
        self._requests.extendleft(reversed(list(requests)))

    def remove_request(self, request: Request) -> None:
        """Take out any request; O(n)."""
        self._requests.remove(request)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)


class PriorityRequestQueue:
    """The lowest `Request.get_rank` first: by priority, then arrival. Who is put back takes the place of its rank.

    A heap of (rank, serial number, request). Taking out from the middle only marks the entry as dead; the dead leave
    when they surface, or all at once when they are in the majority. So every operation is O(log n), amortised.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, int, Request]] = []
        # Request id -> the serial number of its live entry, which also breaks ties with a dead one of the same rank.
        self._live: dict[str, int] = {}
        self._serial = itertools.count()

    def add_request(self, request: Request) -> None:
        """Queue a request. REQUIRES: it is not queued."""
        assert request.request_id not in self._live, f"{request.request_id} is queued already"
        serial = self._live[request.request_id] = next(self._serial)
        heapq.heappush(self._heap, (request.get_rank(), serial, request))

    def peek_request(self) -> Request:
        """The one of the lowest rank."""
        while not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][-1]

    def pop_request(self) -> Request:
        """Take out the one of the lowest rank."""
        request = self.peek_request()
        heapq.heappop(self._heap)
        del self._live[request.request_id]
        return request

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put requests back, each in the place of its rank."""
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        """Take out any request."""
        del self._live[request.request_id]
        if len(self._heap) > 2 * len(self._live) + _MIN_DEAD:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, _, request in sorted(filter(self._is_live, self._heap)))

    def _is_live(self, entry: tuple[Rank, int, Request]) -> bool:
        _, serial, request = entry
        return self._live.get(request.request_id) == serial


def create_request_queue(policy: SchedulingPolicy) -> RequestQueue:
    """The queue of a scheduling policy."""
    return PriorityRequestQueue() if policy == "priority" else FCFSRequestQueue()
