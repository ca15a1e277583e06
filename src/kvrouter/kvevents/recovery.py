"""What a sequence number means: gaps, restarts and lost history of one publisher, as a transition table.

    state                 meaning
    LIVE                  every event since the publisher started, or since it last held nothing, is in the index
    RECOVERING            numbers are missing; a replay is under way and live messages are held back
    DEGRADED              history is lost: the index was cleared and knows less than the pod holds
    DEGRADED_RECOVERING   as RECOVERING, while still DEGRADED

No sockets, threads or clocks here: the worker that owns the stream carries the actions out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from kvrouter.kvevents.adapters import EventMessage


class StreamState(Enum):
    """Where a stream of events stands; the value is its public name."""

    LIVE = "live"
    RECOVERING = "recovering"
    DEGRADED = "degraded"
    DEGRADED_RECOVERING = "degraded (recovering)"


class Input(Enum):
    """What happened to a stream."""

    IN_ORDER = auto()  # a message with the number expected next
    GAP = auto()  # a message with a higher number, or a message dropped for lack of room
    SEEN = auto()  # a message that a replay brought already
    REGRESSION = auto()  # a message with a lower number than the one before it: the publisher restarted
    START = auto()  # the stream was just opened
    REPLAYED = auto()  # the replay brought all that was missing
    NOTHING_YET = auto()  # no replay, and nothing to miss either: the publisher has never been heard
    HISTORY_LOST = auto()  # the replay failed, or begins later than asked
    REBUILT = auto()  # the pod announced that it holds nothing, or long built on known blocks only
    RESET = auto()  # someone else knows that the publisher restarted, or fell silent for good


class Action(Enum):
    """What the owner of the stream does, in order."""

    APPLY = auto()  # enter the message into the index
    HOLD = auto()  # keep the message until the replay is over
    REQUEST_REPLAY = auto()  # ask for all from the expected number on
    CLEAR = auto()  # forget the pod's blocks
    RESTART = auto()  # expect number 0, drop what is held, ignore replays under way
    JUDGE_AGAIN = auto()  # look at the message anew, by the state reached now
    RELEASE = auto()  # enter what the replay brought, then what is held


_S, _I, _A = StreamState, Input, Action

TRANSITIONS: Final[dict[tuple[StreamState, Input], tuple[StreamState, tuple[Action, ...]]]] = {
    (_S.LIVE, _I.START): (_S.RECOVERING, (_A.REQUEST_REPLAY,)),
    (_S.LIVE, _I.IN_ORDER): (_S.LIVE, (_A.APPLY,)),
    (_S.LIVE, _I.SEEN): (_S.LIVE, ()),
    (_S.LIVE, _I.GAP): (_S.RECOVERING, (_A.HOLD, _A.REQUEST_REPLAY)),
    (_S.RECOVERING, _I.IN_ORDER): (_S.RECOVERING, (_A.HOLD,)),
    (_S.RECOVERING, _I.SEEN): (_S.RECOVERING, ()),
    (_S.RECOVERING, _I.GAP): (_S.RECOVERING, (_A.HOLD,)),
    (_S.RECOVERING, _I.REPLAYED): (_S.LIVE, (_A.RELEASE,)),
    (_S.RECOVERING, _I.NOTHING_YET): (_S.LIVE, ()),
    (_S.RECOVERING, _I.HISTORY_LOST): (_S.DEGRADED, (_A.CLEAR, _A.RELEASE)),
    (_S.DEGRADED, _I.IN_ORDER): (_S.DEGRADED, (_A.APPLY,)),
    (_S.DEGRADED, _I.SEEN): (_S.DEGRADED, ()),
    (_S.DEGRADED, _I.GAP): (_S.DEGRADED_RECOVERING, (_A.HOLD, _A.REQUEST_REPLAY)),
    (_S.DEGRADED, _I.REBUILT): (_S.LIVE, ()),
    (_S.DEGRADED_RECOVERING, _I.IN_ORDER): (_S.DEGRADED_RECOVERING, (_A.HOLD,)),
    (_S.DEGRADED_RECOVERING, _I.SEEN): (_S.DEGRADED_RECOVERING, ()),
    (_S.DEGRADED_RECOVERING, _I.GAP): (_S.DEGRADED_RECOVERING, (_A.HOLD,)),
    (_S.DEGRADED_RECOVERING, _I.REPLAYED): (_S.DEGRADED, (_A.RELEASE,)),
    (_S.DEGRADED_RECOVERING, _I.HISTORY_LOST): (_S.DEGRADED, (_A.CLEAR, _A.RELEASE)),
    (_S.DEGRADED_RECOVERING, _I.REBUILT): (_S.RECOVERING, ()),
    **{(state, _I.REGRESSION): (_S.LIVE, (_A.CLEAR, _A.RESTART, _A.JUDGE_AGAIN)) for state in StreamState},
    **{(state, _I.RESET): (_S.LIVE, (_A.CLEAR, _A.RESTART)) for state in StreamState},
}
"""(state, input) -> (next state, actions). A pair that is not here cannot happen."""


@dataclass(slots=True)
class StreamRecovery:
    """The state of one publisher's stream; owned by one thread.

    Attributes:
        state: where the stream stands.
        expected: number of the next message to enter; all below it are entered or given up.
        generation: counts restarts; a replay asked for in an earlier one is void.
        held: live messages that wait for the replay, ascending.
    """

    max_held: int = 4096
    rebuilt_after: int = 100
    """Batches in a row, all of whose blocks had known parents, after which a degraded stream counts as rebuilt."""

    state: StreamState = StreamState.LIVE
    expected: int = 0
    generation: int = 0
    held: deque[EventMessage] = field(default_factory=deque)
    _last_live: int = -1
    _asked_after: int = -1  # number of the live message that made us ask for a replay
    _clean_batches: int = 0

    def judge(self, seq: int) -> Input:
        """Say what a live message's number means now."""
        if seq <= self._last_live:
            return Input.REGRESSION
        if seq < self.expected:
            return Input.SEEN
        return Input.IN_ORDER if seq == self.expected else Input.GAP

    def feed(self, happened: Input) -> tuple[Action, ...]:
        """Make the transition, and return what is to be done."""
        self.state, actions = TRANSITIONS[self.state, happened]
        if Action.REQUEST_REPLAY in actions:
            self._asked_after = self._last_live
        if happened in (Input.HISTORY_LOST, Input.RESET, Input.REGRESSION):
            self._clean_batches = 0
        return actions

    def on_live(self, message: EventMessage) -> tuple[Action, ...]:
        """Take a live message; HOLD and RESTART are carried out here already, the other actions are returned."""
        happened = self.judge(message.seq)
        if happened is Input.REGRESSION:
            self.feed(happened)
            self.restart()
            return (Action.CLEAR, *self.on_live(message))
        self._last_live = message.seq
        actions = self.feed(happened)
        if Action.HOLD in actions and len(self.held) < self.max_held:
            self.held.append(message)  # beyond the bound: a gap, noticed when the next message is judged
        return tuple(action for action in actions if action is not Action.HOLD)

    def restart(self) -> None:
        """Expect a new publisher's first message."""
        self.expected = 0
        self.generation += 1
        self.held.clear()
        self._last_live = -1

    def judge_replay(self, messages: Sequence[EventMessage] | None, *, complete: bool) -> Input:
        """Say what the end of a replay means; `messages` is None when it failed."""
        if messages is None:
            never_heard = self.expected == 0 and not self.held
            return Input.NOTHING_YET if never_heard and self.state is StreamState.RECOVERING else Input.HISTORY_LOST
        return Input.REPLAYED if complete else Input.HISTORY_LOST

    def release(self, replayed: Sequence[EventMessage], *, complete: bool) -> Iterator[EventMessage | Action]:
        """Yield the messages to enter, in order and each once; a REQUEST_REPLAY in between ends it early.

        `complete` says that the replay told all the publisher had. A held message that was there before the replay was
        asked for, and that the publisher does not know, is of a publisher that is gone: it is dropped. Of an incomplete
        replay, only what follows its last hole counts: what came before may have been taken back in the hole.
        """
        for message in replayed if complete else _after_last_hole(replayed):
            if message.seq >= self.expected:
                self.expected = message.seq + 1
                yield message
        if not complete and self.held:
            self.expected = max(self.expected, self.held[0].seq)  # what lies between is lost
        while self.held:
            message = self.held[0]
            if message.seq > self.expected and not (complete and message.seq <= self._asked_after):
                self.feed(Input.GAP)  # later messages were not held for lack of room: ask again, keep the rest
                yield Action.REQUEST_REPLAY
                return
            self.held.popleft()
            if message.seq == self.expected:
                self.expected += 1
                yield message

    def note_batch(self, *, cleared: bool, has_unknown_parents: bool) -> None:
        """Learn from an entered batch whether a degraded stream is whole again."""
        self._clean_batches = 0 if has_unknown_parents else self._clean_batches + 1
        is_degraded = self.state in (StreamState.DEGRADED, StreamState.DEGRADED_RECOVERING)
        if is_degraded and (cleared or self._clean_batches >= self.rebuilt_after):
            self.feed(Input.REBUILT)


def _after_last_hole(messages: Sequence[EventMessage]) -> Sequence[EventMessage]:
    start = len(messages)
    while start > 0 and (start == len(messages) or messages[start - 1].seq + 1 == messages[start].seq):
        start -= 1
    return messages[start:]
