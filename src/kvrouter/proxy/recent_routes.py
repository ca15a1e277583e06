"""What was sent where a moment ago: prompts count as cached on their pod before its events say so.

```
block key -> Route(pod, expires_at)      one Route per request, shared by all its keys
```
While a request waits for its first byte its route does not expire; afterwards its pod's events have a short time to
arrive. A key belongs to the request that was routed last. Belongs to the event loop's thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Route:
    """Where one request went."""

    pod: str
    expires_at: float = math.inf


class RecentRoutes:
    """A bounded map from block keys to the pods that are about to hold them."""

    def __init__(self, max_keys: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Remember at most `max_keys` keys (the oldest go first), each `ttl_s` seconds past its first byte."""
        self._routes: dict[int, Route] = {}  # in order of insertion
        self._max_keys = max_keys
        self._ttl_s = ttl_s
        self._clock = clock

    def __len__(self) -> int:
        """Keys remembered, expired ones included."""
        return len(self._routes)

    def add(self, keys: Sequence[int], pod: str) -> Route:
        """Remember that a prompt of these block keys goes to `pod`."""
        route = Route(pod)
        routes = self._routes
        for key in keys:
            routes.pop(key, None)  # so that it becomes the youngest
            routes[key] = route
        excess = len(routes) - self._max_keys
        if excess > 0:
            for key in [key for key, _ in zip(routes, range(excess), strict=False)]:
                del routes[key]
        return route

    def first_byte(self, route: Route) -> None:
        """The pod has computed the prompt; its events are on their way. Idempotent."""
        if route.expires_at == math.inf:
            route.expires_at = self._clock() + self._ttl_s

    def failed(self, route: Route) -> None:
        """The request did not get through: nothing of it counts any more."""
        route.expires_at = -math.inf

    def forget(self, pod: str) -> None:
        """The pod has lost its cache."""
        self._routes = {key: route for key, route in self._routes.items() if route.pod != pod}

    def extend(self, keys: Sequence[int], known: dict[str, int], pods: Collection[str]) -> dict[str, int]:
        """Return how many blocks each pod is about to hold beyond those it is known to hold.

        Args:
            keys: the prompt's block keys, in order.
            known: pod -> leading blocks it is known to hold; absent pods hold none.
            pods: the pods asked about.

        Returns:
            pod -> further blocks, for pods that have any.
        """
        now = self._clock()
        extra = {}
        for pod in pods:
            start = end = known.get(pod, 0)
            while end < len(keys) and (route := self._routes.get(keys[end])) and route.pod == pod:
                if route.expires_at <= now:
                    break
                end += 1
            if end > start:
                extra[pod] = end - start
        return extra
