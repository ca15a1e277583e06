"""The small parts of the proxy: event boundaries, and what was sent where a moment ago."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvrouter.proxy.event_stream import MAX_HELD_BYTES, EventBuffer
from kvrouter.proxy.recent_routes import RecentRoutes

PIECES = st.lists(st.sampled_from([b"data: x", b"\n", b"\n\n", b"\r\n", b"\r\n\r\n", b":", b""]), max_size=40)


@given(PIECES)
def test_bytes_come_out_as_they_went_in_and_never_end_inside_an_event(pieces: list[bytes]) -> None:
    buffer = EventBuffer()
    out = b""
    for piece in pieces:
        ready = buffer.feed(piece)
        assert not ready or ready.endswith((b"\n\n", b"\r\n\r\n"))
        out += ready
    held = buffer.rest()
    assert out + held == b"".join(pieces)
    assert b"\n\n" not in held
    assert b"\r\n\r\n" not in held
    assert buffer.rest() == b""


def test_endless_event_is_passed_on_in_parts() -> None:
    buffer = EventBuffer()
    assert buffer.feed(b"x" * MAX_HELD_BYTES) == b""
    assert len(buffer.feed(b"x")) == MAX_HELD_BYTES + 1
    assert buffer.rest() == b""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_routes(max_keys: int = 100, ttl_s: float = 5.0) -> tuple[RecentRoutes, Clock]:
    clock = Clock()
    return RecentRoutes(max_keys, ttl_s, clock), clock


def test_prompt_counts_where_it_was_sent_until_some_time_after_its_first_byte() -> None:
    routes, clock = make_routes()
    route = routes.add([1, 2, 3], "a")
    clock.now = 1000.0
    assert routes.extend([1, 2, 3, 4], {}, ["a", "b"]) == {"a": 3}
    routes.first_byte(route)
    clock.now = 1004.9
    routes.first_byte(route)
    assert routes.extend([1, 2, 9], {}, ["a"]) == {"a": 2}
    clock.now = 1005.0
    assert routes.extend([1, 2, 3], {}, ["a"]) == {}


def test_recent_blocks_extend_known_ones() -> None:
    routes, _ = make_routes()
    routes.add([1, 2, 3, 4], "a")
    assert routes.extend([1, 2, 3, 4, 5], {"a": 2}, ["a"]) == {"a": 2}
    assert routes.extend([9, 2, 3, 4], {"a": 1, "b": 4}, ["a", "b"]) == {"a": 3}
    assert routes.extend([1, 2], {"a": 2}, ["a"]) == {}


def test_failed_request_and_lost_pod_count_no_more() -> None:
    routes, _ = make_routes()
    failed = routes.add([1, 2], "a")
    routes.failed(failed)
    routes.first_byte(failed)
    assert routes.extend([1, 2], {}, ["a"]) == {}
    routes.add([5, 6], "a")
    routes.add([7], "b")
    routes.forget("a")
    assert routes.extend([5, 6], {}, ["a"]) == {}
    assert routes.extend([7], {}, ["b"]) == {"b": 1}


def test_last_route_of_a_key_counts() -> None:
    routes, _ = make_routes()
    routes.add([1, 2, 3], "a")
    routes.add([1, 2, 4], "b")
    assert routes.extend([1, 2, 3], {}, ["a", "b"]) == {"b": 2}


@given(st.lists(st.lists(st.integers(0, 30), unique=True, max_size=12), max_size=20))
def test_memory_is_bounded_and_the_youngest_keys_stay(prompts: list[list[int]]) -> None:
    routes, _ = make_routes(max_keys=10)
    order: list[int] = []
    for keys in prompts:
        routes.add(keys, "a")
        order = [key for key in order if key not in keys] + keys
        assert len(routes) <= 10
    kept = set(order[-10:])
    for key in range(31):
        assert routes.extend([key], {}, ["a"]) == ({"a": 1} if key in kept else {})
