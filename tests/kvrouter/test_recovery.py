"""The recovery state machine, without sockets or threads."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter.kvevents.adapters import EventMessage
from kvrouter.kvevents.recovery import TRANSITIONS, Action, Input, StreamRecovery, StreamState

S, I, A = StreamState, Input, Action  # noqa: E741


def message(seq: int) -> EventMessage:
    return EventMessage("t", seq, b"")


def messages(*seqs: int) -> list[EventMessage]:
    return [message(seq) for seq in seqs]


def released(
    recovery: StreamRecovery, replayed: Sequence[EventMessage], *, complete: bool = True
) -> list[int | Action]:
    return [step if isinstance(step, Action) else step.seq for step in recovery.release(replayed, complete=complete)]


def live(recovery: StreamRecovery, seq: int) -> tuple[Action, ...]:
    actions = recovery.on_live(message(seq))
    if A.APPLY in actions:
        recovery.expected = seq + 1
    return actions


def test_every_state_knows_what_to_do_with_every_live_message() -> None:
    for state in S:
        for happened in (I.IN_ORDER, I.SEEN, I.GAP, I.REGRESSION, I.RESET):
            assert (state, happened) in TRANSITIONS


def test_every_recovering_state_ends_with_the_replay() -> None:
    for state in (S.RECOVERING, S.DEGRADED_RECOVERING):
        for happened in (I.REPLAYED, I.HISTORY_LOST):
            assert TRANSITIONS[state, happened][0] in (S.LIVE, S.DEGRADED)


def test_messages_wait_for_the_replay_and_are_entered_once_in_order() -> None:
    recovery = StreamRecovery()
    assert live(recovery, 0) == (A.APPLY,)
    assert live(recovery, 3) == (A.REQUEST_REPLAY,)
    assert live(recovery, 4) == ()
    assert recovery.state is S.RECOVERING
    recovery.feed(recovery.judge_replay(messages(1, 2, 3), complete=True))
    assert released(recovery, messages(1, 2, 3)) == [1, 2, 3, 4]
    assert live(recovery, 5) == (A.APPLY,)


def test_live_messages_that_the_replay_brought_are_not_entered_again() -> None:
    recovery = StreamRecovery()
    live(recovery, 2)
    recovery.feed(I.REPLAYED)
    assert released(recovery, messages(0, 1, 2, 3, 4)) == [0, 1, 2, 3, 4]
    assert live(recovery, 3) == ()
    assert live(recovery, 4) == ()
    assert live(recovery, 5) == (A.APPLY,)


def test_number_that_goes_back_is_a_new_generation() -> None:
    recovery = StreamRecovery()
    live(recovery, 0)
    live(recovery, 1)
    assert live(recovery, 0) == (A.CLEAR, A.APPLY)
    assert recovery.generation == 1
    assert live(recovery, 1) == (A.APPLY,)


def test_new_generation_whose_beginning_was_missed_is_replayed() -> None:
    recovery = StreamRecovery()
    live(recovery, 0)
    live(recovery, 1)
    live(recovery, 2)
    assert live(recovery, 1) == (A.CLEAR, A.REQUEST_REPLAY)
    assert recovery.expected == 0


def test_restart_during_a_replay_voids_what_was_held() -> None:
    recovery = StreamRecovery()
    live(recovery, 5)
    live(recovery, 6)
    assert live(recovery, 0) == (A.CLEAR, A.APPLY)
    assert not recovery.held
    assert recovery.state is S.LIVE


def test_message_that_its_publisher_does_not_know_is_late_and_dropped() -> None:
    recovery = StreamRecovery()
    live(recovery, 0)
    live(recovery, 9)
    recovery.feed(I.REPLAYED)
    assert released(recovery, messages(1)) == [1]
    assert recovery.expected == 2


def test_lost_history_resumes_after_the_last_hole() -> None:
    recovery = StreamRecovery()
    live(recovery, 9)
    happened = recovery.judge_replay(messages(2, 3, 6, 7, 8), complete=False)
    assert happened is I.HISTORY_LOST
    assert recovery.feed(happened) == (A.CLEAR, A.RELEASE)
    assert released(recovery, messages(2, 3, 6, 7, 8), complete=False) == [6, 7, 8, 9]
    assert recovery.state is S.DEGRADED


def test_failed_replay_resumes_with_what_is_held() -> None:
    recovery = StreamRecovery()
    live(recovery, 0)
    live(recovery, 5)
    live(recovery, 6)
    happened = recovery.judge_replay(None, complete=False)
    assert happened is I.HISTORY_LOST
    recovery.feed(happened)
    assert released(recovery, [], complete=False) == [5, 6]


def test_publisher_that_was_never_heard_has_no_history_to_lose() -> None:
    recovery = StreamRecovery()
    assert recovery.feed(I.START) == (A.REQUEST_REPLAY,)
    recovery.feed(recovery.judge_replay(None, complete=False))
    assert recovery.state is S.LIVE
    assert live(recovery, 0) == (A.APPLY,)


def test_more_messages_than_may_be_held_are_asked_for_again() -> None:
    recovery = StreamRecovery(max_held=2)
    for seq in (1, 2, 3, 4):
        live(recovery, seq)
    recovery.feed(I.REPLAYED)
    assert released(recovery, messages(0)) == [0, 1, 2]
    assert live(recovery, 5) == (A.REQUEST_REPLAY,)
    recovery.feed(I.REPLAYED)
    assert released(recovery, messages(3, 4, 5)) == [3, 4, 5]


@pytest.mark.parametrize("how", ["cleared", "clean"])
def test_degraded_stream_is_trusted_again_when_it_is_rebuilt(how: str) -> None:
    recovery = StreamRecovery(rebuilt_after=3)
    live(recovery, 0)
    live(recovery, 2)
    recovery.feed(I.HISTORY_LOST)
    recovery.note_batch(cleared=False, has_unknown_parents=False)
    recovery.note_batch(cleared=False, has_unknown_parents=True)
    recovery.note_batch(cleared=False, has_unknown_parents=False)
    recovery.note_batch(cleared=False, has_unknown_parents=False)
    assert recovery.state is S.DEGRADED
    recovery.note_batch(cleared=how == "cleared", has_unknown_parents=False)
    assert recovery.state is S.LIVE


@given(
    arrived=st.lists(st.booleans(), min_size=1, max_size=40),
    delays=st.lists(st.integers(0, 5), min_size=40, max_size=40),
    max_held=st.integers(1, 5),
)
def test_any_pattern_of_loss_ends_with_each_message_entered_once(
    arrived: list[bool], delays: list[int], max_held: int
) -> None:
    """The publisher sends 0, 1, 2, ...; some arrive; a replay tells all sent by the time it is answered."""
    recovery = StreamRecovery(max_held=max_held)
    entered: list[int] = []
    answer_at: int | None = None
    start = 0

    def answer(sent: int) -> None:
        nonlocal answer_at, start
        answer_at = None
        replayed = messages(*range(start, sent))
        recovery.feed(recovery.judge_replay(replayed, complete=True))
        for step in recovery.release(replayed, complete=True):
            if isinstance(step, Action):
                answer_at, start = sent, recovery.expected
            else:
                entered.append(step.seq)

    for seq, arrives in enumerate([*arrived, True]):
        if arrives:
            actions = live(recovery, seq)
            if A.APPLY in actions:
                entered.append(seq)
            if A.REQUEST_REPLAY in actions:
                answer_at, start = seq + delays[seq % len(delays)], recovery.expected
        if answer_at is not None and seq >= answer_at:
            answer(seq + 1)
    while answer_at is not None:
        answer(len(arrived) + 1)
    assert entered == list(range(len(entered)))
    assert recovery.state is S.LIVE
    if max_held == 5 and not any(delays):
        assert entered == list(range(len(arrived) + 1))
