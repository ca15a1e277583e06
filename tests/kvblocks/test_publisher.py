from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from kvblocks import publisher as publisher_module
from kvblocks.errors import KVBlocksError, PublisherError, ReplayError, ReplayTimeoutError
from kvblocks.events import BlockRemoved, BlockStored, KVEventBatch, decode_batch, encode_batch
from kvblocks.publisher import EventPublisher, NullEventPublisher, ZmqEventPublisher, binds, offset_endpoint
from kvblocks.replay import ReplayClient

TCP = "tcp://127.0.0.1:*"
TOPIC = "kv@pod-a@tiny"


def batch(number: int) -> KVEventBatch:
    return KVEventBatch(float(number), [BlockRemoved([number], "GPU")])


@pytest.fixture
def publisher() -> Iterator[ZmqEventPublisher]:
    with ZmqEventPublisher(TCP, TCP, TOPIC) as started:
        yield started


def subscribe(publisher: ZmqEventPublisher, subscribers: Any) -> tuple[Any, int]:
    """Connect a subscriber and publish until it hears; return it and the first sequence number still to come."""
    subscriber = subscribers(publisher.endpoint)
    num_published = 0
    while not subscriber.socket.poll(20):
        publisher.publish(batch(num_published))
        num_published += 1
    subscriber.recv_until_seq(num_published - 1)
    return subscriber, num_published


def replay_endpoint(publisher: ZmqEventPublisher) -> str:
    endpoint = publisher.replay_endpoint
    assert endpoint is not None
    return endpoint


def test_subscriber_gets_topic_sequence_and_batch(publisher: ZmqEventPublisher, subscribers: Any) -> None:
    subscriber, seq = subscribe(publisher, subscribers)
    stored = KVEventBatch(2.5, [BlockStored([1], None, list(range(16)), 16, medium="GPU")], data_parallel_rank=3)
    for event_batch in (stored, batch(8)):
        publisher.publish(event_batch)
    assert subscriber.recv() == (TOPIC.encode(), seq, encode_batch(stored))
    topic, next_seq, payload = subscriber.recv()
    assert (topic, next_seq) == (TOPIC.encode(), seq + 1)
    assert decode_batch(payload) == KVEventBatch(8.0, batch(8).events, data_parallel_rank=0)


def test_batches_published_before_start_are_sent_from_sequence_zero() -> None:
    publisher = ZmqEventPublisher(TCP, TCP, TOPIC, data_parallel_rank=2)
    for number in range(3):
        publisher.publish(batch(number))
    with publisher:
        result = ReplayClient(replay_endpoint(publisher)).replay(0)
    assert [(frame.seq, frame.topic) for frame in result.frames] == [(0, TOPIC), (1, TOPIC), (2, TOPIC)]
    assert [decode_batch(frame.payload).ts for frame in result.frames] == [0.0, 1.0, 2.0]
    assert {decode_batch(frame.payload).data_parallel_rank for frame in result.frames} == {2}
    assert result.complete


@pytest.mark.parametrize(
    ("start", "seqs", "complete"), [(0, [7, 8, 9], False), (7, [7, 8, 9], True), (9, [9], True), (10, [], True)]
)
def test_replay_serves_what_the_buffer_holds(start: int, seqs: list[int], complete: bool) -> None:
    publisher = ZmqEventPublisher(TCP, TCP, buffer_steps=3)
    for number in range(10):
        publisher.publish(batch(number))
    with publisher:
        result = ReplayClient(replay_endpoint(publisher)).replay(start)
    assert [frame.seq for frame in result.frames] == seqs
    assert result.complete is complete


def test_a_replay_longer_than_zmqs_default_mark_arrives_whole() -> None:
    publisher = ZmqEventPublisher(TCP, TCP)
    for number in range(5000):
        publisher.publish(batch(number))
    with publisher:
        result = ReplayClient(replay_endpoint(publisher), timeout_s=20).replay(1)
    assert len(result.frames) == 4999
    assert result.complete


def test_overflow_drops_and_leaves_a_gap() -> None:
    publisher = ZmqEventPublisher(TCP, TCP, max_queue_size=2)
    for number in range(5):
        publisher.publish(batch(number))
    assert publisher.num_dropped == 3
    with publisher:
        client = ReplayClient(replay_endpoint(publisher))
        assert [frame.seq for frame in client.replay(0).frames] == [0, 1]
        publisher.publish(batch(5))
        result = client.replay(0)
        while len(result.frames) < 3:
            result = client.replay(0)
    assert [frame.seq for frame in result.frames] == [0, 1, 5]
    assert not result.complete


def test_publish_does_not_wait_for_a_stuck_thread(monkeypatch: pytest.MonkeyPatch, subscribers: Any) -> None:
    entered, go_on = threading.Event(), threading.Event()
    real_encode = publisher_module.encode_batch
    with ZmqEventPublisher(TCP, max_queue_size=2) as publisher:
        subscriber, seq = subscribe(publisher, subscribers)

        def slow_encode(event_batch: KVEventBatch) -> bytes:
            entered.set()
            assert go_on.wait(10)
            return real_encode(event_batch)

        monkeypatch.setattr(publisher_module, "encode_batch", slow_encode)
        publisher.publish(batch(0))
        assert entered.wait(10)
        for number in range(1, 10):
            publisher.publish(batch(number))
        assert publisher.num_dropped == 7
        go_on.set()
        assert [subscriber.recv()[1] for _ in range(3)] == [seq, seq + 1, seq + 2]
        publisher.publish(batch(10))
        assert subscriber.recv()[1] == seq + 10


def test_a_batch_that_cannot_be_encoded_is_counted_and_skipped(publisher: ZmqEventPublisher, subscribers: Any) -> None:
    subscriber, seq = subscribe(publisher, subscribers)
    publisher.publish(KVEventBatch(0.0, [BlockRemoved([2**80])]))
    publisher.publish(batch(1))
    assert subscriber.recv()[1] == seq + 1
    assert publisher.num_dropped == 1


def test_close_flushes_is_idempotent_and_final(subscribers: Any) -> None:
    publisher = ZmqEventPublisher(TCP)
    publisher.start()
    publisher.start()
    subscriber, seq = subscribe(publisher, subscribers)
    for number in range(500):
        publisher.publish(batch(number))
    publisher.close()
    publisher.close()
    assert subscriber.recv_until_seq(seq + 499) == list(range(seq, seq + 500))
    with pytest.raises(PublisherError, match="after close"):
        publisher.publish(batch(0))
    with pytest.raises(PublisherError, match="after close"):
        publisher.start()


def test_close_without_start() -> None:
    publisher = ZmqEventPublisher(TCP)
    publisher.close()
    publisher.close()


def test_close_releases_its_ports_and_threads() -> None:
    with ZmqEventPublisher(TCP, TCP) as first:
        endpoint, replay = first.endpoint, first.replay_endpoint
    assert "kv-event-publisher" not in {thread.name for thread in threading.enumerate()}
    with start_when_free(endpoint.replace("127.0.0.1", "*"), replay) as second:
        assert second.replay_endpoint == replay


def start_when_free(endpoint: str, replay: str) -> ZmqEventPublisher:
    """A running publisher on ports that ZMQ may still be closing in the background."""
    deadline = time.monotonic() + 20.0
    while True:
        publisher = ZmqEventPublisher(endpoint, replay)
        try:
            publisher.start()
            return publisher
        except PublisherError:
            publisher.close()
            assert time.monotonic() < deadline, "the ports were never released"


def test_a_with_block_that_cannot_start_leaves_nothing_open(publisher: ZmqEventPublisher) -> None:
    second = ZmqEventPublisher(TCP, replay_endpoint(publisher))
    with pytest.raises(PublisherError, match="cannot bind"), second:
        pass
    with pytest.raises(PublisherError, match="after close"):
        second.start()


def test_a_taken_port_is_named(publisher: ZmqEventPublisher) -> None:
    taken = replay_endpoint(publisher)
    second = ZmqEventPublisher(TCP, taken)
    with pytest.raises(PublisherError, match=f"cannot bind '{taken}'"):
        second.start()
    second.close()


def test_a_publisher_connects_to_an_address_without_wildcard() -> None:
    with zmq.Context.instance().socket(zmq.SUB) as hub:
        hub.setsockopt(zmq.LINGER, 0)
        hub.subscribe(b"")
        port = hub.bind_to_random_port("tcp://127.0.0.1")
        with ZmqEventPublisher(f"tcp://127.0.0.1:{port}") as publisher:
            while not hub.poll(20):
                publisher.publish(batch(0))
        assert hub.recv_multipart()[0] == b""


def test_ipc_endpoints(tmp_path: Path, subscribers: Any) -> None:
    with ZmqEventPublisher(f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay") as publisher:
        subscribe(publisher, subscribers)
        assert ReplayClient(replay_endpoint(publisher)).replay(0).frames[0].seq == 0


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "tcp://*:0"])
def test_port_zero_is_chosen_by_the_system(endpoint: str, subscribers: Any) -> None:
    with ZmqEventPublisher(endpoint) as publisher:
        assert not publisher.endpoint.endswith(":0")
        subscribe(publisher, subscribers)


def test_malformed_replay_requests_do_not_stop_the_publisher(publisher: ZmqEventPublisher) -> None:
    with zmq.Context.instance().socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(replay_endpoint(publisher))
        for request in ([b""], [b"", b"short"], [b"x", bytes(8)], [b"", bytes(8), b"more"], [b"", bytes(9)]):
            dealer.send_multipart(request)
        dealer.send_multipart([b"", bytes(8)])
        assert dealer.poll(10_000)
        assert dealer.recv_multipart() == [b"", b"", b"\xff" * 8, b""]


def test_a_failed_thread_drops_what_comes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("boom")

    publisher = ZmqEventPublisher(TCP)
    monkeypatch.setattr(publisher, "_send", fail)
    with publisher:
        publisher.publish(batch(0))
        assert publisher._thread is not None
        publisher._thread.join(10)
        publisher.publish(batch(1))
        assert publisher.num_dropped >= 1
    assert "kv events publisher failed" in caplog.text


@pytest.mark.parametrize(
    ("endpoint", "rank", "expected"),
    [
        ("tcp://*:5557", 0, "tcp://*:5557"),
        ("tcp://*:5557", 3, "tcp://*:5560"),
        ("tcp://[::1]:5557", 1, "tcp://[::1]:5558"),
        ("tcp://*:*", 3, "tcp://*:*"),
        ("tcp://*:0", 3, "tcp://*:0"),
        ("inproc://events", 2, "inproc://events_dp2"),
        ("ipc:///run/events", 2, "ipc:///run/events_dp2"),
    ],
)
def test_rank_offsets_the_endpoint(endpoint: str, rank: int, expected: str) -> None:
    assert offset_endpoint(endpoint, rank) == expected


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("tcp://*:5557", True),
        ("tcp://[::]:5557", True),
        ("ipc:///x", True),
        ("inproc://x", True),
        ("tcp://h:5557", False),
    ],
)
def test_which_endpoints_are_bound(endpoint: str, expected: bool) -> None:
    assert binds(endpoint) is expected


@pytest.mark.parametrize(
    "arguments",
    [{"buffer_steps": 0}, {"hwm": 0}, {"max_queue_size": -1}, {"data_parallel_rank": -1}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_bad_settings_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(PublisherError, match=next(iter(arguments))):
        ZmqEventPublisher(TCP, **arguments)
    with pytest.raises(PublisherError, match="no port"):
        ZmqEventPublisher("tcp://host", data_parallel_rank=1)


def test_null_publisher_has_the_same_face() -> None:
    publishers: list[EventPublisher] = [NullEventPublisher(), ZmqEventPublisher(TCP)]
    for publisher in publishers:
        publisher.start()
        publisher.publish(batch(0))
        publisher.close()


class FakeRouter:
    """Answers one replay request with the given messages."""

    def __init__(self, answers: list[list[bytes]]) -> None:
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._answers = answers
        self.request: list[bytes] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        if self._socket.poll(10_000):
            client, *self.request = self._socket.recv_multipart()
            for answer in self._answers:
                self._socket.send_multipart([client, *answer])

    def __enter__(self) -> FakeRouter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._socket.close()


def seq_bytes(seq: int) -> bytes:
    return seq.to_bytes(8, "big")


def test_replay_of_older_engines_has_no_topic() -> None:
    answers = [[b"", seq_bytes(4), b"a"], [b"", seq_bytes(5), b"b"], [b"", b"\xff" * 8, b""]]
    with FakeRouter(answers) as router:
        result = ReplayClient(router.endpoint).replay(4)
    assert router.request == [b"", seq_bytes(4)]
    assert [(frame.seq, frame.topic, frame.payload) for frame in result.frames] == [(4, "", b"a"), (5, "", b"b")]
    assert result.complete


def test_replay_with_a_hole_is_incomplete() -> None:
    answers = [[b"", b"t", seq_bytes(4), b"a"], [b"", b"t", seq_bytes(6), b"b"], [b"", b"", b"\xff" * 8, b""]]
    with FakeRouter(answers) as router:
        assert not ReplayClient(router.endpoint).replay(4).complete


@pytest.mark.parametrize(
    "answer",
    [[b"", b"x"], [b"", b"t", b"short", b"a"], [b"x", b"t", seq_bytes(1), b"a"], [b"", b"t", seq_bytes(1), b"a", b"b"]],
)
def test_an_answer_that_is_no_replay_is_an_error(answer: list[bytes]) -> None:
    with FakeRouter([answer]) as router, pytest.raises(ReplayError, match="not a replay answer"):
        ReplayClient(router.endpoint).replay(0)


def test_sequences_that_go_back_are_an_error() -> None:
    answers = [[b"", b"t", seq_bytes(5), b"a"], [b"", b"t", seq_bytes(4), b"b"]]
    with FakeRouter(answers) as router, pytest.raises(ReplayError, match="goes back from 5 to 4"):
        ReplayClient(router.endpoint).replay(0)


def test_a_missing_end_marker_is_a_timeout() -> None:
    with (
        FakeRouter([[b"", b"t", seq_bytes(0), b"a"]]) as router,
        pytest.raises(ReplayTimeoutError, match="1 frames came"),
    ):
        ReplayClient(router.endpoint, timeout_s=0.3).replay(0)


def test_nobody_there_is_a_timeout() -> None:
    with ZmqEventPublisher(TCP, TCP) as gone:
        endpoint = replay_endpoint(gone)
    with pytest.raises(ReplayTimeoutError, match=endpoint):
        ReplayClient(endpoint, timeout_s=0.1).replay(0)


def test_bad_replay_arguments_are_named() -> None:
    with pytest.raises(KVBlocksError, match="timeout_s"):
        ReplayClient(TCP, timeout_s=0)
    with pytest.raises(KVBlocksError, match="start_seq"):
        ReplayClient("tcp://127.0.0.1:1").replay(-1)
    with pytest.raises(ReplayError, match="cannot connect"):
        ReplayClient("nonsense").replay(0)
