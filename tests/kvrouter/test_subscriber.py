"""Events over real sockets: publishers, gaps, restarts, and pods that come and go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.kvrouter.event_engine import Engine, batch, cleared, removed, stored, tokens

from kvblocks.events import KVEventBatch
from kvblocks.publisher import ZmqEventPublisher
from kvrouter.errors import DeadlineExceededError, EndpointError, UnknownPodError
from kvrouter.kvblock.in_memory import InMemoryIndex
from kvrouter.kvblock.token_processor import TokenProcessor
from kvrouter.kvevents import subscriber_manager
from kvrouter.kvevents.adapters import EventMessage
from kvrouter.kvevents.subscriber_manager import PodEndpoint, SubscriberManager
from kvrouter.kvevents.worker import StreamId

TIMEOUT = 20.0
POD, MODEL = "pod-a", "m"
TOKENS = tokens(8)
KEYS = TokenProcessor().keys(np.array(TOKENS, np.uint32), MODEL)


@pytest.fixture
def index() -> InMemoryIndex:
    return InMemoryIndex()


@pytest.fixture
def manager(index: InMemoryIndex) -> Iterator[SubscriberManager]:
    with SubscriberManager(index, TokenProcessor(), replay_timeout_s=TIMEOUT) as made:
        yield made


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as made:
        yield made


def subscribe(manager: SubscriberManager, engine: Engine, *, model: str | None = None, replay: bool = True) -> None:
    manager.add(PodEndpoint(POD, model, engine.endpoint, engine.replay_endpoint if replay else None))
    engine.wait_for_subscriber()


def block(i: int) -> bytes:
    """A batch that stores block i of TOKENS after block i - 1."""
    return batch(stored([100 + i], TOKENS[16 * i : 16 * i + 16], 99 + i if i else None))


def test_events_reach_the_index_under_the_name_of_the_endpoint(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine
) -> None:
    manager.add(PodEndpoint("http://a:8000", "served-name", engine.endpoint, engine.replay_endpoint))
    engine.wait_for_subscriber()
    seq = engine.send(batch(stored([1, 2], TOKENS[:32])))
    manager.wait_applied("http://a:8000", seq, TIMEOUT)
    keys = TokenProcessor().keys(np.array(TOKENS, np.uint32), "served-name")
    assert index.score(keys) == {"http://a:8000": 2.0}
    assert manager.state("http://a:8000") == "live"


def test_gap_is_replayed_exactly_once(manager: SubscriberManager, index: InMemoryIndex, engine: Engine) -> None:
    subscribe(manager, engine)
    manager.wait_applied(POD, engine.send(block(0)), TIMEOUT)
    for i in range(1, 5):
        engine.send(block(i), lost=True)
    seq = engine.send(block(5))
    manager.wait_applied(POD, seq, TIMEOUT)
    assert index.score(KEYS) == {POD: 6.0}
    assert engine.replay_starts[-1] == 1
    assert manager.counters["gaps"] == 1
    assert manager.counters["blocks_stored"] == 6
    for i in range(6):  # one removal each takes everything back: nothing was entered twice
        seq = engine.send(batch(removed(100 + i)))
    manager.wait_applied(POD, seq, TIMEOUT)
    assert index.stats().num_records == 0
    assert manager.state(POD) == "live"


def test_pod_that_published_before_it_was_added_is_caught_up(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine
) -> None:
    for i in range(4):
        engine.send(block(i))
    subscribe(manager, engine, model=MODEL)
    manager.wait_applied(POD, 3, TIMEOUT)  # by replay alone: no live message comes
    assert index.score(KEYS) == {POD: 4.0}


def test_restart_in_place_drops_the_old_generation(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine
) -> None:
    subscribe(manager, engine)
    for i in range(4):
        seq = engine.send(block(i))
    manager.wait_applied(POD, seq, TIMEOUT)
    engine.restart()
    engine.send(block(0))
    for _ in range(4):
        seq = engine.send(batch())
    manager.wait_applied(POD, seq, TIMEOUT)
    assert index.score(KEYS) == {POD: 1.0}
    assert manager.counters["generations"] == 1
    assert manager.state(POD) == "live"


def test_late_message_of_a_gone_generation_is_dropped(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine
) -> None:
    subscribe(manager, engine)
    for i in range(4):
        engine.send(block(i))
    engine.restart()
    engine.send(batch())
    # Number 7 is not in the new publisher's history.
    engine.send(block(0), seq=7, forgotten=True)
    engine.next_seq = 1
    engine.send(batch(stored([500], tokens(1, seed=5))), lost=True)
    for _ in range(8):
        seq = engine.send(batch())
    manager.wait_applied(POD, seq, TIMEOUT)
    assert index.score(KEYS) == {}
    assert index.stats().num_records == 1


def test_lost_history_clears_the_pod_and_distrusts_it_until_it_is_rebuilt(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine
) -> None:
    subscribe(manager, engine)
    manager.wait_applied(POD, engine.send(block(0)), TIMEOUT)
    engine.send(block(1), lost=True, forgotten=True)
    seq = engine.send(batch(stored([700], tokens(1, seed=7))))
    manager.wait_applied(POD, seq, TIMEOUT)
    assert index.score(KEYS) == {}, "block 0 may be gone since"
    assert index.stats().num_blocks == 1
    assert manager.state(POD) == "degraded"
    assert manager.counters["histories_lost"] == 1
    seq = engine.send(batch(cleared()))  # now we know all it holds: nothing
    manager.wait_applied(POD, seq, TIMEOUT)
    assert manager.state(POD) == "live"
    assert index.stats().num_blocks == 0


def test_gap_without_a_replay_endpoint_costs_the_pod_its_blocks(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine
) -> None:
    subscribe(manager, engine, replay=False)
    engine.send(block(0))
    engine.send(block(1), lost=True)
    seq = engine.send(block(2))
    manager.wait_applied(POD, seq, TIMEOUT)
    assert index.stats().num_blocks == 0, "block 2 builds on a block that is not known"
    assert manager.counters["unknown_parent"] == 1
    assert manager.state(POD) == "degraded"


def test_malformed_frames_are_counted_and_harmless(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine
) -> None:
    subscribe(manager, engine)
    engine.send_raw(engine.topic)
    engine.send_raw(engine.topic, b"short", b"payload")
    engine.send_raw(engine.topic, b"\xff" * 8, b"payload")
    engine.send(b"\xc1 not msgpack")
    engine.send(b"")
    seq = engine.send(block(0))
    manager.wait_applied(POD, seq, TIMEOUT)
    assert manager.counters["malformed_message"] == 3
    assert manager.counters["malformed_batch"] == 2
    assert index.score(KEYS) == {POD: 1.0}


def test_removed_pod_is_forgotten_and_may_return(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine
) -> None:
    subscribe(manager, engine)
    manager.wait_applied(POD, engine.send(block(0)), TIMEOUT)
    manager.remove(POD)
    assert index.stats().num_records == 0
    assert manager.pods() == []
    with pytest.raises(UnknownPodError):
        manager.state(POD)
    subscribe(manager, engine, model=MODEL)
    manager.wait_applied(POD, 0, TIMEOUT)
    assert index.score(KEYS) == {POD: 1.0}


def test_reset_forgets_blocks_of_an_engine_that_died_silently(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine
) -> None:
    subscribe(manager, engine)
    for i in range(3):
        seq = engine.send(block(i))
    manager.wait_applied(POD, seq, TIMEOUT)
    manager.reset_pod(POD)
    assert index.score(KEYS) == {}
    engine.restart()
    manager.wait_applied(POD, engine.send(block(0)), TIMEOUT)
    assert index.score(KEYS) == {POD: 1.0}
    with pytest.raises(UnknownPodError):
        manager.reset_pod("nobody")


def test_reset_of_an_engine_that_lives_on_is_made_good_by_replay(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine
) -> None:
    subscribe(manager, engine)
    for i in range(3):
        seq = engine.send(block(i))
    manager.wait_applied(POD, seq, TIMEOUT)
    manager.reset_pod(POD)
    manager.wait_applied(POD, engine.send(block(3)), TIMEOUT)
    assert index.score(KEYS) == {POD: 4.0}
    assert manager.state(POD) == "live"


def test_silent_pod_expires(manager: SubscriberManager, index: InMemoryIndex, engine: Engine) -> None:
    subscribe(manager, engine)
    manager.wait_applied(POD, engine.send(block(0)), TIMEOUT)
    assert manager.expire(silent_since=0.0) == []
    assert manager.expire(silent_since=float("inf")) == [POD]
    assert index.stats().num_records == 0


def test_engine_restarted_on_the_same_port_is_heard_again(manager: SubscriberManager, index: InMemoryIndex) -> None:
    with Engine() as first:
        subscribe(manager, first)
        for i in range(3):
            seq = first.send(block(i))
        manager.wait_applied(POD, seq, TIMEOUT)
        endpoint = first.endpoint
    with Engine(endpoint=endpoint, replay=False) as second:
        second.wait_for_subscriber()
        second.send(block(0))
        for _ in range(4):
            seq = second.send(batch())
        manager.wait_applied(POD, seq, TIMEOUT)
    assert index.score(KEYS) == {POD: 1.0}


def test_our_publisher_and_subscriber_understand_each_other(manager: SubscriberManager, index: InMemoryIndex) -> None:
    with ZmqEventPublisher("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", topic="kv@x@m") as publisher:
        for i in range(5):
            parent = 99 + i if i else None
            publisher.publish(KVEventBatch(ts=1.0, events=[stored([100 + i], TOKENS[16 * i : 16 * i + 16], parent)]))
        manager.add(PodEndpoint(POD, MODEL, publisher.endpoint, publisher.replay_endpoint))
        manager.wait_applied(POD, 4, TIMEOUT)
        assert index.score(KEYS) == {POD: 5.0}


def test_pods_that_connect_to_us_are_named_by_their_topics(manager: SubscriberManager, index: InMemoryIndex) -> None:
    address = manager.listen("tcp://127.0.0.1:*")
    with (
        ZmqEventPublisher(address, topic="kv@pod-b@m") as by_topic,
        ZmqEventPublisher(address, topic="unrelated") as unrelated,
    ):
        unrelated.publish(KVEventBatch(ts=1.0, events=[stored([1], TOKENS[:16])]))
        # A PUB socket drops what it sends before its connection is up: publish until one arrives.
        seq = 0
        for seq in range(2000):
            by_topic.publish(KVEventBatch(ts=1.0, events=[stored([1], TOKENS[:16])]))
            try:
                manager.wait_applied("pod-b", seq, 0.05)
                break
            except DeadlineExceededError:
                continue
    assert index.score(KEYS) == {"pod-b": 1.0}
    assert manager.pods() == ["pod-b"]


def test_bad_endpoints_are_refused(manager: SubscriberManager, engine: Engine) -> None:
    with pytest.raises(EndpointError, match="nonsense"):
        manager.add(PodEndpoint(POD, MODEL, "nonsense"))
    subscribe(manager, engine)
    with pytest.raises(EndpointError, match="belongs to pod 'pod-a'"):
        manager.add(PodEndpoint("pod-b", MODEL, engine.endpoint))
    with pytest.raises(EndpointError, match="cannot bind"):
        manager.listen(engine.endpoint)


def test_changed_endpoint_replaces_the_old_one(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine
) -> None:
    subscribe(manager, engine, model="old")
    manager.wait_applied(POD, engine.send(block(0)), TIMEOUT)
    subscribe(manager, engine, model=MODEL)
    manager.wait_applied(POD, 0, TIMEOUT)
    assert index.score(KEYS) == {POD: 1.0}
    assert index.stats().num_records == 1


def test_late_message_of_a_changed_endpoint_enters_nothing(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    receivers = []
    add = manager._subscriber.add
    monkeypatch.setattr(manager._subscriber, "add", lambda *args: (receivers.append(args[1]), add(*args))[1])
    subscribe(manager, engine, model="old")
    subscribe(manager, engine, model=MODEL)
    manager.wait_applied(POD, engine.send(block(0)), TIMEOUT)
    receivers[0](EventMessage(topic="kv@pod-a@m", seq=0, payload=block(0)))  # it was read when the endpoint changed
    manager.wait_applied(POD, engine.send(block(1)), TIMEOUT)
    assert index.score(KEYS) == {POD: 2.0}
    assert index.stats().num_records == 2


def test_failed_subscriber_clears_its_pods_and_marks_them(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe(manager, engine, model=MODEL)
    manager.wait_applied(POD, engine.send(block(0)), TIMEOUT)
    assert index.score(KEYS) == {POD: 1.0}

    def broken(stream: StreamId, message: EventMessage) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(manager, "_put", broken)
    engine.send(block(1))
    for thread in (manager._subscriber._thread, *(worker.thread for worker in manager._pool._workers)):
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert index.stats().num_records == 0, "nobody would hear what the pod takes back"
    assert manager.states() == {POD: "degraded"}
    assert manager.counters["subscriber_failed"] == 1
    manager.reset_pod(POD)
    assert manager.state(POD) == "degraded", "nothing makes it good again"
    with pytest.raises(EndpointError, match="has failed"):
        manager.add(PodEndpoint("pod-b", MODEL, "tcp://127.0.0.1:9"))
    manager.remove(POD)
    assert manager.counters["workers_failed"] == 4


def test_states_are_one_snapshot_while_pods_come_and_go(manager: SubscriberManager) -> None:
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            manager.states()

    with ThreadPoolExecutor(1) as executor:
        asking = executor.submit(ask)
        for number in range(50):
            manager.add(PodEndpoint(f"pod-{number}", MODEL, f"tcp://127.0.0.1:{number + 1}"))
            manager.remove(f"pod-{number}")
        done.set()
        assert asking.exception(TIMEOUT) is None


def test_topics_of_one_endpoint_are_limited(
    manager: SubscriberManager, index: InMemoryIndex, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber_manager, "_MAX_STREAMS", 1)
    subscribe(manager, engine)
    engine.send(block(0))
    engine.send_raw(b"kv@pod-a@other", bytes(8), block(0))
    manager.wait_applied(POD, engine.send(batch()), TIMEOUT)
    assert manager.counters["too_many_streams"] == 1
    assert index.stats().num_records == 1


def test_close_is_idempotent_and_works_before_start(index: InMemoryIndex) -> None:
    manager = SubscriberManager(index, TokenProcessor())
    manager.add(PodEndpoint(POD, MODEL, "tcp://127.0.0.1:9"))
    manager.close()
    manager.close()
    with pytest.raises(EndpointError, match="closed"):
        manager.add(PodEndpoint("pod-b", MODEL, "tcp://127.0.0.1:10"))
