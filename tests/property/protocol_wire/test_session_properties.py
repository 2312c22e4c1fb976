"""Sessions against anything: random messages, and random schedules of two sessions at once."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vfiouser_protocol.constants import Command
from vfiouser_protocol.framing import Message
from vfiouser_protocol.header import Header
from vfiouser_protocol.session import (
    CommandReceived,
    ConnectionEnd,
    ConnectionPhase,
    MessageRefused,
    ProtocolSession,
    ReplyReceived,
)
from wire_pair import joined
from wire_strategies import u32


@st.composite
def messages(draw: st.DrawFn) -> Message:
    """Messages with likely and unlikely headers."""
    payload = draw(st.binary(max_size=48))
    header = Header(
        draw(st.integers(0, 4)),
        draw(st.integers(0, 20)),
        16 + len(payload),
        draw(st.sampled_from([0, 1, 2, 15, 0x10, 0x11, 0x21, 0x30]) | u32),
        draw(st.integers(0, 40)),
    )
    return Message(header, payload, draw(st.lists(st.integers(3, 9), max_size=3)))


@pytest.mark.parametrize("role", ConnectionEnd)
@pytest.mark.parametrize("negotiated", [False, True])
@given(stream=st.lists(messages(), max_size=12))
def test_whatever_comes(role: ConnectionEnd, negotiated: bool, stream: list[Message]) -> None:
    """Proves that no message raises, no descriptor is lost, silence is kept, and the end is final."""
    pair = joined()
    session = (pair.server if role is ConnectionEnd.SERVER else pair.client) if negotiated else ProtocolSession(role)
    for message in stream:
        was_closed = session.phase is ConnectionPhase.CLOSED
        result = session.receive(message)
        surplus = [] if isinstance(result, MessageRefused) else list(result.surplus_fds)
        assert sorted(message.fds) == sorted([*result.fds, *surplus])
        if isinstance(result, MessageRefused):
            if result.close:
                assert session.phase is ConnectionPhase.CLOSED
            if message.header.type == 1 or was_closed:
                assert result.reply is None
            if message.header.no_reply and message.header.command != Command.VERSION:
                assert result.reply is None
            assert result.reply is None or len(result.reply) == 16
        elif isinstance(result, CommandReceived):
            assert not was_closed
            assert len(message.payload) >= result.spec.min_payload
            assert result.spec.sender is role.peer
            answer = session.error_reply(result.header, 5)
            assert bool(answer) != (message.header.no_reply and message.header.command != Command.VERSION)


class Conversation(RuleBasedStateMachine):
    """Two sessions that send, read and answer at random times, in random pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = joined(piece=5)
        self.sessions = {ConnectionEnd.CLIENT: self.pair.client, ConnectionEnd.SERVER: self.pair.server}
        self.sent: dict[ConnectionEnd, deque[tuple[int, bool]]] = {role: deque() for role in ConnectionEnd}
        self.owed: dict[ConnectionEnd, deque[CommandReceived]] = {role: deque() for role in ConnectionEnd}
        self.counter = 0

    @rule(role=st.sampled_from(ConnectionEnd), size=st.integers(0, 20), no_reply=st.booleans())
    def send_command(self, role: ConnectionEnd, size: int, no_reply: bool) -> None:
        """One side sends a numbered command, perhaps without wanting a reply."""
        self.counter += 1
        command = Command.REGION_WRITE if role is ConnectionEnd.CLIENT else Command.DMA_WRITE
        payload = self.counter.to_bytes(16, "little") + bytes(size)
        session = self.sessions[role]
        _, data = session.command(command, payload, self.counter, no_reply=no_reply)
        self.pair.send(session, data)
        self.sent[role].append((self.counter, no_reply))

    @rule(role=st.sampled_from(ConnectionEnd))
    def read(self, role: ConnectionEnd) -> None:
        """One side reads all there is; the replies it gets are those of its oldest commands."""
        for result in self.pair.receive(self.sessions[role]):
            if isinstance(result, CommandReceived):
                self.owed[role].append(result)
            else:
                assert isinstance(result, ReplyReceived)
                while self.sent[role][0][1]:
                    self.sent[role].popleft()
                expected, _ = self.sent[role].popleft()
                assert expected == result.token
                assert result.payload == expected.to_bytes(16, "little")

    @precondition(lambda self: any(self.owed.values()))
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """One side answers its oldest unanswered command."""
        role = data.draw(st.sampled_from([role for role in ConnectionEnd if self.owed[role]]))
        command = self.owed[role].popleft()
        session = self.sessions[role]
        self.pair.send(session, session.reply(command.header, command.payload[:16]))

    @invariant()
    def books_are_right(self) -> None:
        """What each session believes to be outstanding and unanswered is so."""
        for role, session in self.sessions.items():
            waiting = [token for token, no_reply in self.sent[role] if not no_reply]
            assert waiting == [entry.token for entry in session.outstanding.values()]
            owed = [command for command in self.owed[role] if not command.header.no_reply]
            assert len(owed) == session.unanswered


TestConversation = Conversation.TestCase
