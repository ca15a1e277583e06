"""The order in which waiting requests are admitted. Mirrors vllm/v1/core/sched/request_queue.py."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

from folovllm.request import Request


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


def create_request_queue(policy: Literal["fcfs"]) -> RequestQueue:
    """The queue of a scheduling policy."""
    return {"fcfs": FCFSRequestQueue}[policy]()
