"""A server session, and a client session, against peers that break the rules one at a time."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from vfiouser_protocol import messages as m
from vfiouser_protocol.capabilities import VersionCapabilities, encode_version
from vfiouser_protocol.codec import encode
from vfiouser_protocol.commands import COMMANDS, CommandSpec
from vfiouser_protocol.constants import Command
from vfiouser_protocol.errors import LocalProtocolError
from vfiouser_protocol.framing import Message
from vfiouser_protocol.header import Header, pack_header
from vfiouser_protocol.session import (
    TRANSITIONS,
    VERDICTS,
    CommandReceived,
    ConnectionEnd,
    ConnectionPhase,
    MessageRefused,
    Oddity,
    PhaseEvent,
    ProtocolSession,
    ReplyReceived,
)
from wire_pair import joined

HELLO = encode_version(VersionCapabilities(), 1)
READ = encode(m.RegionRead(0, 7, 4))


def message(
    command: int, payload: bytes = b"", *, msg_id: int = 5, flags: int = 0, fds: Sequence[int] = (), error: int = 0
) -> Message:
    """A message as a framer would return it."""
    return Message(Header(msg_id, command, 16 + len(payload), flags, error), payload, list(fds))


def einval(command: int, msg_id: int = 5) -> bytes:
    """The EINVAL reply to `message(command)`."""
    return pack_header(msg_id, command, 16, 0x21, errno.EINVAL)


@pytest.fixture
def server() -> ProtocolSession:
    """A server whose client has negotiated."""
    return joined().server


@pytest.fixture
def client() -> ProtocolSession:
    """A client whose server has agreed."""
    return joined().client


# --- Negotiation ---


@pytest.mark.parametrize(
    ("odd", "answered"),
    [
        (message(Command.DEVICE_GET_INFO, bytes(16)), True),
        (message(Command.DMA_READ, bytes(16)), True),
        (message(99), True),
        (message(Command.VERSION, b""), True),
        (message(Command.VERSION, b"\0\0\0"), True),
        (message(Command.VERSION, b"\1\0\0\0{}\0"), True),
        (message(Command.VERSION, b"\0\0\0\0{]\0"), True),
        (message(Command.VERSION, HELLO, fds=[8, 9]), True),
        (message(Command.VERSION, b"", flags=0x10), True),
        (message(Command.DEVICE_GET_INFO, bytes(16), flags=0x10), False),
        (message(Command.VERSION, HELLO, flags=1), False),
        (message(Command.VERSION, HELLO, flags=2), False),
        (message(Command.VERSION, HELLO, flags=15), False),
    ],
)
def test_bad_beginnings(odd: Message, answered: bool) -> None:
    """Proves that a server ends a connection without a good VERSION, after an answer if one is due."""
    server = ProtocolSession(ConnectionEnd.SERVER)
    refused = server.receive(odd)
    assert isinstance(refused, MessageRefused)
    assert refused.close
    assert refused.reply == (einval(odd.header.command) if answered else None)
    assert odd.fds == refused.fds
    assert server.phase is ConnectionPhase.CLOSED
    after = server.receive(message(Command.VERSION, HELLO))
    assert isinstance(after, MessageRefused)
    assert (after.reply, after.close) == (None, True)


def test_version_is_answered_in_spite_of_no_reply() -> None:
    """Proves that VERSION with NO_REPLY gets its reply: nobody could go on without."""
    server = ProtocolSession(ConnectionEnd.SERVER)
    received = server.receive(message(Command.VERSION, HELLO, flags=0x10))
    assert isinstance(received, CommandReceived)
    reply = server.accept(received.header, VersionCapabilities())
    assert reply[8:12] == b"\1\0\0\0"
    assert len(reply) <= 16 + len(HELLO)
    assert server.phase is ConnectionPhase.READY


def test_server_may_refuse_version() -> None:
    """Proves that an error reply to VERSION ends the connection."""
    server = ProtocolSession(ConnectionEnd.SERVER)
    received = server.receive(message(Command.VERSION, HELLO))
    assert isinstance(received, CommandReceived)
    assert server.error_reply(received.header, errno.EBUSY) == pack_header(5, 1, 16, 0x21, errno.EBUSY)
    assert server.phase is ConnectionPhase.CLOSED


def test_two_versions_before_the_answer() -> None:
    """Proves that a second VERSION does not replace the first before that is answered."""
    server = ProtocolSession(ConnectionEnd.SERVER)
    server.receive(message(Command.VERSION, HELLO))
    assert isinstance(server.receive(message(Command.VERSION, HELLO)), MessageRefused)
    assert server.phase is ConnectionPhase.CLOSED


def test_second_version_changes_nothing(server: ProtocolSession) -> None:
    """Proves that a second VERSION is EINVAL and the connection stays usable."""
    agreed = server.negotiated
    refused = server.receive(message(Command.VERSION, HELLO))
    assert isinstance(refused, MessageRefused)
    assert (refused.reply, refused.close) == (einval(1), False)
    assert server.negotiated is agreed
    assert isinstance(server.receive(message(Command.REGION_READ, READ)), CommandReceived)


def test_version_cannot_be_answered_like_others() -> None:
    """Proves that `reply` does not let a server past negotiation, nor `accept` anybody else."""
    server = ProtocolSession(ConnectionEnd.SERVER)
    with pytest.raises(LocalProtocolError):
        server.accept(Header(0, 1, 16, 0), VersionCapabilities())
    received = server.receive(message(Command.VERSION, HELLO))
    assert isinstance(received, CommandReceived)
    with pytest.raises(LocalProtocolError):
        server.reply(received.header)


@pytest.mark.parametrize(
    ("reply", "nfds"),
    [(b"", 0), (b"\1\0\0\0{}\0", 0), (b"\0\0\x09\0{}\0", 0), (b"\0\0\0\0{", 0)],
    ids=["no payload", "major 1", "minor too high", "no JSON"],
)
def test_client_refuses_a_bad_answer(reply: bytes, nfds: int) -> None:
    """Proves that a client ends the connection, without a word, when the server's answer is impossible."""
    client = ProtocolSession(ConnectionEnd.CLIENT)
    msg_id, _ = client.propose(VersionCapabilities())
    refused = client.receive(message(Command.VERSION, reply, msg_id=msg_id, flags=1, fds=range(nfds)))
    assert isinstance(refused, MessageRefused)
    assert (refused.reply, refused.close) == (None, True)
    assert client.phase is ConnectionPhase.CLOSED


def test_client_is_refused() -> None:
    """Proves that an error answer to VERSION reaches the client as an error and ends the connection."""
    client = ProtocolSession(ConnectionEnd.CLIENT)
    msg_id, _ = client.propose(VersionCapabilities(), token="hello")
    answer = client.receive(message(1, msg_id=msg_id, flags=0x21, error=errno.EINVAL, fds=[3]))
    assert isinstance(answer, ReplyReceived)
    assert answer.token == "hello"
    assert answer.error is not None
    assert answer.error.errno == errno.EINVAL
    assert answer.surplus_fds == [3]
    assert client.phase is ConnectionPhase.CLOSED


@pytest.mark.parametrize("flags", [1, 0x21])
def test_client_is_answered_after_the_end(flags: int) -> None:
    """Proves that the answer to VERSION is refused, as everything is, once something else ended the connection."""
    client = ProtocolSession(ConnectionEnd.CLIENT)
    msg_id, _ = client.propose(VersionCapabilities())
    refused = client.receive(message(Command.REGION_READ, bytes(16)))
    assert isinstance(refused, MessageRefused)
    assert refused.close
    late = client.receive(message(Command.VERSION, encode_version({}), msg_id=msg_id, flags=flags, fds=[9]))
    assert isinstance(late, MessageRefused)
    assert (late.reply, late.fds, client.phase) == (None, [9], ConnectionPhase.CLOSED)


def test_client_takes_nothing_before_version() -> None:
    """Proves that a client that is negotiating takes neither commands nor stray replies."""
    for odd in (message(Command.DMA_READ, bytes(16)), message(1, bytes(4), flags=1)):
        client = ProtocolSession(ConnectionEnd.CLIENT)
        refused = client.receive(odd)
        assert isinstance(refused, MessageRefused)
        assert refused.close


def test_only_one_proposal() -> None:
    """Proves that a client sends VERSION once."""
    client = ProtocolSession(ConnectionEnd.CLIENT)
    client.propose(VersionCapabilities())
    with pytest.raises(LocalProtocolError):
        client.propose(VersionCapabilities())


# --- Commands of the peer ---


@pytest.mark.parametrize("number", [0, 19, 99, 0xFFFF, Command.DMA_READ, Command.DMA_WRITE])
def test_illegal_commands(server: ProtocolSession, number: int) -> None:
    """Proves that unknown commands and the server's own are EINVAL, or silence with NO_REPLY."""
    refused = server.receive(message(number, bytes(16), fds=[4]))
    assert isinstance(refused, MessageRefused)
    assert (refused.reply, refused.close, refused.fds) == (einval(number), False, [4])
    silent = server.receive(message(number, bytes(16), flags=0x10))
    assert isinstance(silent, MessageRefused)
    assert (silent.reply, silent.close) == (None, False)
    assert isinstance(server.receive(message(Command.REGION_READ, READ)), CommandReceived)


CLIENT_COMMANDS = [spec for spec in COMMANDS.values() if spec.min_payload and spec.phase is ConnectionPhase.READY]


@pytest.mark.parametrize("spec", CLIENT_COMMANDS, ids=lambda spec: spec.command.name)
def test_short_payloads(spec: CommandSpec) -> None:
    """Proves that a payload shorter than the fixed part never reaches a handler, for either role."""
    pair = joined()
    receiver = pair.server if spec.sender is ConnectionEnd.CLIENT else pair.client
    refused = receiver.receive(message(spec.command, bytes(spec.min_payload - 1)))
    assert isinstance(refused, MessageRefused)
    assert (refused.reply, refused.close, refused.errno) == (einval(spec.command), False, errno.EINVAL)


def test_write_multi_needs_an_agreement(server: ProtocolSession) -> None:
    """Proves that REGION_WRITE_MULTI is EINVAL unless both sides announced it."""
    refused = server.receive(message(Command.REGION_WRITE_MULTI, bytes(8)))
    assert isinstance(refused, MessageRefused)
    assert refused.reply == einval(15)
    assert "announce" in refused.reason


def test_reserved_bits_are_ignored(server: ProtocolSession) -> None:
    """Proves that undefined flags, ERROR and the error field mean nothing on a command."""
    received = server.receive(message(Command.REGION_READ, READ, flags=0xFFFF_FFE0, error=99))
    assert isinstance(received, CommandReceived)
    assert server.reply(received.header, b"x")[8:16] == b"\1\0\0\0\0\0\0\0"


@pytest.mark.parametrize("kind", [2, 7, 15])
def test_bad_types(server: ProtocolSession, kind: int) -> None:
    """Proves that an undefined type is not executed, is answered, and does not end the connection."""
    refused = server.receive(message(Command.REGION_READ, READ, flags=kind, fds=[6]))
    assert isinstance(refused, MessageRefused)
    assert (refused.reply, refused.close, refused.fds) == (einval(9), False, [6])


@pytest.mark.parametrize(
    ("command", "payload", "kept", "surplus"),
    [
        (Command.DEVICE_GET_INFO, bytes(16), [], [4, 5, 6]),
        (Command.DMA_MAP, bytes(32), [4], [5, 6]),
        (Command.DEVICE_SET_IRQS, bytes(20), [4, 5, 6], []),
        (Command.DEVICE_RESET, b"", [], [4, 5, 6]),
    ],
)
def test_unexpected_descriptors(
    server: ProtocolSession, command: int, payload: bytes, kept: list[int], surplus: list[int]
) -> None:
    """Proves that descriptors without a meaning are reported for closing while the command goes on."""
    received = server.receive(message(command, payload, fds=[4, 5, 6]))
    assert isinstance(received, CommandReceived)
    assert (list(received.fds), list(received.surplus_fds)) == (kept, surplus)


def test_no_reply_is_obeyed(server: ProtocolSession) -> None:
    """Proves that a NO_REPLY command gets neither a reply nor an error, and is not waited for."""
    posted = server.receive(message(Command.REGION_WRITE, bytes(16), flags=0x10))
    assert isinstance(posted, CommandReceived)
    assert server.unanswered == 0
    assert server.reply(posted.header, bytes(16)) == b""
    assert server.error_reply(posted.header, errno.EIO) == b""


def test_replies_keep_their_order(server: ProtocolSession) -> None:
    """Proves that replies leave in the order of the commands, even if all have the same id."""
    first, second = (server.receive(message(Command.REGION_READ, READ)) for _ in range(2))
    assert isinstance(first, CommandReceived)
    assert isinstance(second, CommandReceived)
    assert server.unanswered == 2
    with pytest.raises(LocalProtocolError, match="REGION_READ is due"):
        server.reply(second.header, READ)
    assert server.reply(first.header, READ) == pack_header(5, 9, 32, 1) + READ
    assert server.error_reply(second.header, errno.EIO) == pack_header(5, 9, 16, 0x21, errno.EIO)
    with pytest.raises(LocalProtocolError, match="nothing is due"):
        server.reply(second.header, READ)


@pytest.mark.parametrize("number", [0, -1, 4097, 1 << 31])
def test_impossible_error_numbers(server: ProtocolSession, number: int) -> None:
    """Proves that an error number that no peer would take becomes EIO."""
    received = server.receive(message(Command.DEVICE_RESET))
    assert isinstance(received, CommandReceived)
    assert server.error_reply(received.header, number)[12:] == errno.EIO.to_bytes(4, "little")


# --- Commands of our own ---


def test_who_may_send_what(server: ProtocolSession, client: ProtocolSession) -> None:
    """Proves that each side sends only its own commands, and VERSION only at the start."""
    for session, number in ((server, 9), (server, 1), (client, 11), (client, 1), (client, 99)):
        with pytest.raises(LocalProtocolError):
            session.command(number, bytes(16))
    with pytest.raises(LocalProtocolError, match="write_multiple"):
        client.command(Command.REGION_WRITE_MULTI, bytes(8))
    with pytest.raises(LocalProtocolError):
        ProtocolSession(ConnectionEnd.CLIENT).command(Command.DEVICE_RESET, b"")
    with pytest.raises(LocalProtocolError, match="always answered"):
        ProtocolSession(ConnectionEnd.CLIENT).command(Command.VERSION, HELLO, no_reply=True)


def test_command_bytes(client: ProtocolSession) -> None:
    """Proves the message of a command, and that a NO_REPLY command is not waited for."""
    msg_id, data = client.command(Command.REGION_READ, READ, "token")
    assert data == pack_header(msg_id, 9, 32, 0) + READ
    assert client.outstanding[msg_id].token == "token"
    posted, data = client.command(Command.REGION_WRITE, READ, no_reply=True)
    assert data == pack_header(posted, 10, 32, 0x10) + READ
    assert posted not in client.outstanding


def test_reply_finds_its_command(server: ProtocolSession) -> None:
    """Proves that replies may come in any order and bring back their tokens, each once."""
    ids = [server.command(Command.DMA_READ, bytes(16), token)[0] for token in "abc"]
    for msg_id, token in zip(reversed(ids), "cba", strict=True):
        answer = server.receive(message(Command.DMA_READ, bytes(16), msg_id=msg_id, flags=1, fds=[3]))
        assert isinstance(answer, ReplyReceived)
        assert answer.token == token
        assert answer.error is None
        assert (list(answer.fds), list(answer.surplus_fds)) == ([], [3])
    assert not server.outstanding
    again = server.receive(message(Command.DMA_READ, bytes(16), msg_id=ids[0], flags=1))
    assert isinstance(again, MessageRefused)
    assert (again.reply, again.close) == (None, True)


def test_reply_descriptors(client: ProtocolSession) -> None:
    """Proves that a region's descriptor is kept, a second one is surplus, and an error keeps none."""
    for flags, kept, surplus in ((1, [3], [4]), (0x21, [], [3, 4])):
        msg_id, _ = client.command(Command.DEVICE_GET_REGION_INFO, bytes(32))
        answer = client.receive(
            message(Command.DEVICE_GET_REGION_INFO, bytes(32), msg_id=msg_id, flags=flags, fds=[3, 4])
        )
        assert isinstance(answer, ReplyReceived)
        assert (list(answer.fds), list(answer.surplus_fds)) == (kept, surplus)


@pytest.mark.parametrize("number", [19, 0])
def test_error_replies(server: ProtocolSession, number: int) -> None:
    """Proves that an error reply, even with a payload or with errno 0, is an error of the peer."""
    msg_id, _ = server.command(Command.DMA_WRITE, bytes(17))
    answer = server.receive(message(Command.DMA_WRITE, bytes(8), msg_id=msg_id, flags=0x21, error=number))
    assert isinstance(answer, ReplyReceived)
    assert answer.error is not None
    assert answer.error.errno == (number or errno.EIO)
    assert "DMA_WRITE" in str(answer.error)


def test_late_replies_are_dropped(server: ProtocolSession) -> None:
    """Proves that the reply to a forgotten command is dropped and counted, and its id is free only then."""
    msg_id, _ = server.command(Command.DMA_READ, bytes(16))
    server.forget(msg_id)
    server.forget(msg_id)
    assert not server.outstanding
    late = server.receive(message(Command.DMA_READ, bytes(16), msg_id=msg_id, flags=1, fds=[3]))
    assert isinstance(late, MessageRefused)
    assert (late.reply, late.close, late.fds) == (None, False, [3])
    assert server.late_replies == 1
    again = server.receive(message(Command.DMA_READ, bytes(16), msg_id=msg_id, flags=1))
    assert isinstance(again, MessageRefused)
    assert again.close


def test_reply_to_a_posted_command_is_dropped(client: ProtocolSession) -> None:
    """Proves that a server which answers a NO_REPLY command is tolerated for a while, not for ever."""
    ids = [client.command(Command.REGION_WRITE, READ, no_reply=True)[0] for _ in range(257)]
    answered = client.receive(message(10, msg_id=ids[-1], flags=0x21, error=errno.EINVAL, fds=[3]))
    assert isinstance(answered, MessageRefused)
    assert (answered.reply, answered.close, answered.fds) == (None, False, [3])
    too_old = client.receive(message(10, msg_id=ids[0], flags=1))
    assert isinstance(too_old, MessageRefused)
    assert too_old.close


def test_reply_of_another_command_ends_the_connection(server: ProtocolSession) -> None:
    """Proves that a reply that names another command than the one it answers is not believed."""
    msg_id, _ = server.command(Command.DMA_READ, bytes(16))
    refused = server.receive(message(Command.DMA_WRITE, bytes(16), msg_id=msg_id, flags=1))
    assert isinstance(refused, MessageRefused)
    assert refused.close
    assert len(server.close()) == 1


def test_ids_are_never_in_use_twice(server: ProtocolSession) -> None:
    """Proves that ids wrap around those outstanding or given up, and that they can run out."""
    kept, _ = server.command(Command.DMA_READ, bytes(16), "kept")
    given_up, _ = server.command(Command.DMA_READ, bytes(16), "given up")
    server.forget(given_up)
    ids = [server.command(Command.DMA_READ, bytes(16))[0] for _ in range(65536 - 2)]
    assert len({kept, given_up, *ids}) == 65536
    with pytest.raises(LocalProtocolError, match="65536 message ids"):
        server.command(Command.DMA_READ, bytes(16))
    answer = server.receive(message(Command.DMA_READ, bytes(16), msg_id=ids[7], flags=1))
    assert isinstance(answer, ReplyReceived)
    assert server.command(Command.DMA_READ, bytes(16))[0] == ids[7]


# --- The end ---


def test_close_gives_up_what_is_outstanding(server: ProtocolSession) -> None:
    """Proves that closing returns the commands that will not be answered, and may be repeated."""
    server.command(Command.DMA_READ, bytes(16), "lost")
    assert [entry.token for entry in server.close()] == ["lost"]
    assert server.close() == []
    assert server.phase is ConnectionPhase.CLOSED
    with pytest.raises(LocalProtocolError):
        server.command(Command.DMA_READ, bytes(16))
    assert isinstance(server.receive(message(Command.REGION_READ, READ)), MessageRefused)


def test_answers_owed_before_a_refusal_can_still_be_given(server: ProtocolSession) -> None:
    """Proves that commands received before the one that ended the connection can be answered."""
    owed = server.receive(message(Command.DEVICE_RESET))
    ending = server.receive(message(Command.REGION_READ, READ, flags=1))
    assert isinstance(owed, CommandReceived)
    assert isinstance(ending, MessageRefused)
    assert ending.close
    assert server.reply(owed.header) == pack_header(5, 13, 16, 1)


def test_tables_name_every_phase() -> None:
    """Proves that every phase can end, and that every oddity has a verdict somewhere."""
    assert all((phase, PhaseEvent.ENDED) in TRANSITIONS for phase in ConnectionPhase)
    assert {oddity for _, oddity in VERDICTS} == set(Oddity)


def test_illegal_moves_are_bugs(server: ProtocolSession) -> None:
    """Proves that a move that the table does not list is an internal error."""
    received = server.receive(message(Command.DEVICE_RESET))
    assert isinstance(received, CommandReceived)
    with pytest.raises(LocalProtocolError, match="cannot take this"):
        server.accept(received.header, VersionCapabilities())


def test_repr_says_where_it_stands(server: ProtocolSession) -> None:
    """Proves that a session in a log shows its role, phase and books."""
    server.command(Command.DMA_READ, bytes(16))
    assert repr(server) == "<Session: server ready, 1 outstanding, 0 unanswered>"
