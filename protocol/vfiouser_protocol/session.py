"""What may be said when: one vfio-user connection as a state machine, for either role, without any I/O.

Rule 1: *both directions live on one stream.* Client and server send commands, each with ids of its own, and a
reply to one side's command may come after any number of the other side's. Only the type bits tell them apart.
So a session keeps two books: `outstanding`, our commands that wait for their replies, by id; and the peer's
commands that wait for ours, in the order in which they came.

Rule 2: *replies leave in the order of their commands*, although ids would allow otherwise: QEMU sends a burst
and waits for the last. `reply` and `error_reply` insist on it. The reply inside a `MessageRefused` has its place in
that order too: it is sent when all commands received before it have been answered.

Rule 3: *ids of the peer mean nothing.* They may repeat, even concurrently, so a command is known by its
`Header` object, not by its id. Ids of our own are never in use twice, and the id of a command that was given
up (`forget`) is kept aside until its late reply has come and been dropped.

Rule 4: *everything about phases is in tables*: `TRANSITIONS` and `VERDICTS` in `session_state`, and
`commands.COMMANDS`. What a table does not list is illegal. The tables are public so that the manual can print
them.

With a twin socket (negotiated by VERSION) the main socket carries the client's commands and their replies,
the twin the server's; a message on the wrong one ends the connection.
"""

from __future__ import annotations

import errno as _errno
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vfiouser_protocol.capabilities import (
    Negotiated,
    VersionCapabilities,
    VersionData,
    accept_reply,
    encode_version,
    negotiate,
    parse_version_request,
)
from vfiouser_protocol.commands import COMMANDS, CommandSpec, ConnectionEnd, ConnectionPhase
from vfiouser_protocol.constants import HEADER_SIZE, PROTOCOL_MINOR, Command
from vfiouser_protocol.errors import LocalProtocolError, StreamError
from vfiouser_protocol.framing import Framer, Message
from vfiouser_protocol.header import (
    COMMAND,
    ERROR,
    NO_REPLY,
    REPLY,
    TYPE_MASK,
    Header,
    command_name,
    pack_header,
)
from vfiouser_protocol.header import error_reply as pack_error_reply
from vfiouser_protocol.limits import MAX_ERRNO, Limits
from vfiouser_protocol.message_ids import MessageIds
from vfiouser_protocol.session_events import NO_FDS, CommandReceived, MessageRefused, Outstanding, ReplyReceived
from vfiouser_protocol.session_state import TRANSITIONS, VERDICTS, WORST, Oddity, OddMessageVerdict, PhaseEvent

__all__ = [
    "TRANSITIONS",
    "VERDICTS",
    "CommandReceived",
    "ConnectionEnd",
    "ConnectionPhase",
    "MessageRefused",
    "OddMessageVerdict",
    "Oddity",
    "Outstanding",
    "PhaseEvent",
    "ProtocolSession",
    "ReplyReceived",
]

_VERSION = int(Command.VERSION)
#: How many of our latest NO_REPLY commands are remembered, to know a reply that should not have been sent.
_MAX_POSTED = 256
_EINVAL = _errno.EINVAL
_new = tuple.__new__


class ProtocolSession:
    """One connection, seen from one end.

    Call protocol: give every message that a `Framer` returns to `receive`. For a `CommandReceived`, send
    what `reply` or `error_reply` returns (nothing, if it is empty); for the VERSION command, what `accept`
    returns, before the next message is given to `receive`. For a `MessageRefused`, send its `reply` in its turn,
    close its `fds`, and the connection if it says so. To send a command, take an id and bytes from `command`;
    its answer comes as a `ReplyReceived` with the token. When the stream ends, call `close`. A client starts
    with `propose`.

    With a twin socket, send the server's commands and the replies to them there, and give `receive` what
    comes from there with ``twin=True``.

    Args:
        role: which end this is.
        limits: what this end accepts; only `new_framer` uses them.

    Attributes:
        phase: where the connection stands.
        negotiated: what VERSION settled; None before.
        proposal: what the client proposed; None before.
        late_replies: replies that came after their commands had been given up.
        ids: which id the next command of ours gets.
    """

    __slots__ = (
        "_forgotten",
        "_legal",
        "_legal_on_twin",
        "_limits",
        "_outstanding",
        "_posted",
        "_proposal_size",
        "_replies_on_main",
        "_unanswered",
        "ids",
        "late_replies",
        "negotiated",
        "phase",
        "proposal",
        "role",
    )

    def __init__(self, role: ConnectionEnd, limits: Limits | None = None) -> None:
        self.role = role
        self.phase = ConnectionPhase.NEGOTIATING
        self.negotiated: Negotiated | None = None
        self.proposal: VersionData | None = None
        self.late_replies = 0
        self._limits = Limits() if limits is None else limits
        self._proposal_size = 0
        self.ids = MessageIds()
        self._outstanding: dict[int, Outstanding] = {}
        self._forgotten: set[int] = set()
        self._posted: deque[int] = deque(maxlen=_MAX_POSTED)
        self._unanswered: deque[Header] = deque()
        # Both stay empty until READY: VERSION, the only command before, takes the slow path.
        self._legal: dict[int, CommandSpec] = {}
        self._legal_on_twin: dict[int, CommandSpec] = {}
        self._replies_on_main = True

    def __repr__(self) -> str:
        return (
            f"<Session: {self.role.value} {self.phase.value}, {len(self._outstanding)} outstanding, "
            f"{len(self._unanswered)} unanswered>"
        )

    @classmethod
    def resumed(cls, role: ConnectionEnd, agreed: Negotiated, limits: Limits | None = None) -> ProtocolSession:
        """Go on with a connection that another process had.

        Args:
            role: which end this is.
            agreed: what VERSION settled.
            limits: as for a new session.
        """
        session = cls(role, limits)
        session._agree(agreed)
        return session

    # --- Receiving ---

    def receive(self, message: Message, *, twin: bool = False) -> CommandReceived | ReplyReceived | MessageRefused:
        """Take a message of the peer and say what it is to us.

        Args:
            message: what the framer returned.
            twin: whether it came over the twin socket.

        Returns:
            A command to execute, a reply to a command of ours, or a refusal.
        """
        header, payload, fds = message
        msg_id, number, _size, flags, _error = header
        kind = flags & TYPE_MASK
        if kind == COMMAND:
            spec = (self._legal_on_twin if twin else self._legal).get(number)
            if spec is None or len(payload) < spec.min_payload:
                return self._receive_unusual_command(message, twin)
            if not flags & NO_REPLY:
                self._unanswered.append(header)
            if not fds:
                return _new(CommandReceived, (spec, header, payload, fds, NO_FDS))
            kept = spec.request_fds
            return _new(CommandReceived, (spec, header, payload, fds[:kept], fds[kept:]))
        if kind != REPLY:
            return self._refuse(message, Oddity.BAD_TYPE)
        if twin is self._replies_on_main:
            return self._refuse(message, Oddity.WRONG_SOCKET)
        waiting = self._outstanding.get(msg_id)
        if waiting is None:
            return self._receive_stray_reply(message)
        if waiting.spec.command != number:
            return self._refuse(message, Oddity.MISMATCHED)
        del self._outstanding[msg_id]
        if number == _VERSION:
            return self._receive_version_reply(message, waiting)
        if not fds:
            return _new(ReplyReceived, (waiting.token, header, payload, fds, NO_FDS))
        kept = 0 if flags & ERROR else waiting.spec.reply_fds
        return ReplyReceived(waiting.token, header, payload, fds[:kept], fds[kept:])

    def _receive_unusual_command(self, message: Message, twin: bool) -> CommandReceived | MessageRefused:
        header, payload, _fds = message
        spec = COMMANDS.get(header.command)
        if spec is None:
            return self._refuse(message, Oddity.UNKNOWN)
        if spec.sender is self.role:
            return self._refuse(message, Oddity.WRONG_SENDER)
        if spec.phase is not self.phase:
            return self._refuse(message, Oddity.WRONG_PHASE)
        if header.command == _VERSION:
            return self._receive_version(message, spec)
        if header.command in (self._legal if twin else self._legal_on_twin):
            return self._refuse(message, Oddity.WRONG_SOCKET)
        if len(payload) < spec.min_payload:
            return self._refuse(message, Oddity.SHORT)
        return self._refuse(message, Oddity.NOT_AGREED)

    def _receive_version(self, message: Message, spec: CommandSpec) -> CommandReceived | MessageRefused:
        header, payload, fds = message
        if fds:
            return self._refuse(message, Oddity.VERSION_FDS)
        if self.proposal is not None:
            # A second one, before the first was answered.
            return self._refuse(message, Oddity.WRONG_PHASE)
        try:
            self.proposal = parse_version_request(payload)
        except StreamError as exc:
            return self._refuse(message, Oddity.VERSION_BAD, str(exc))
        self._proposal_size = len(payload)
        self._unanswered.append(header)
        return CommandReceived(spec, header, payload, fds)

    def _receive_version_reply(self, message: Message, waiting: Outstanding) -> ReplyReceived | MessageRefused:
        header, payload, fds = message
        if self.phase is not waiting.spec.phase:  # something before it ended the connection
            return self._refuse(message, Oddity.WRONG_PHASE)
        if header.is_error:
            self._move(PhaseEvent.REFUSED)
            return ReplyReceived(waiting.token, header, payload, NO_FDS, fds)
        assert self.proposal is not None  # `command` keeps it when it sends VERSION
        try:
            agreement = accept_reply(self.proposal, payload, len(fds))
        except StreamError as exc:
            return self._refuse(message, Oddity.VERSION_BAD, str(exc))
        self._agree(agreement)
        twin = agreement.server.twin_socket
        index = twin.fd_index if agreement.twin and twin is not None else None
        kept = [fd for position, fd in enumerate(fds) if position == index]
        surplus = [fd for position, fd in enumerate(fds) if position != index]
        return ReplyReceived(waiting.token, header, payload, kept, surplus)

    def _receive_stray_reply(self, message: Message) -> MessageRefused:
        msg_id = message.header.msg_id
        if msg_id not in self._forgotten and msg_id not in self.ids.foreign:
            # rust-vmm's server answers some commands although they ask for no reply.
            posted = msg_id in self._posted
            return self._refuse(message, Oddity.POSTED if posted else Oddity.UNSOLICITED)
        self._forgotten.discard(msg_id)
        self.late_replies += 1
        return self._refuse(message, Oddity.LATE)

    def _refuse(self, message: Message, oddity: Oddity, reason: str | None = None) -> MessageRefused:
        header = message.header
        phase = self.phase
        verdict = VERDICTS.get((phase, oddity), WORST)
        spec = COMMANDS.get(header.command)
        silent = header.flags & NO_REPLY and (spec is None or spec.no_reply)
        answer = verdict.answer and not silent and not header.is_reply
        if verdict.close:
            self._move(PhaseEvent.BROKEN)
        if reason is None:
            consequence = "the connection ends" if verdict.close else "refused" if verdict.answer else "dropped"
            what = f"{command_name(header.command)} #{header.msg_id} ({len(message.payload)} bytes)"
            reason = f"{what} while {phase.value}: {oddity.value}; {consequence}"
        reply = pack_error_reply(header, _EINVAL) if answer else None
        return MessageRefused(_EINVAL, reply, message.fds, reason, verdict.close)

    # --- Answering ---

    @property
    def unanswered(self) -> int:
        """How many commands of the peer wait for an answer."""
        return len(self._unanswered)

    def reply(self, header: Header, payload: bytes = b"") -> bytes:
        """Return the success reply to a command.

        Args:
            header: the command's header, the object that `receive` returned.
            payload: the reply's payload.

        Returns:
            The whole message; nothing if the command asked for no reply.

        Raises:
            LocalProtocolError: it is another command's turn.
        """
        head = self.reply_head(header, len(payload))
        return head + payload if head else head

    def reply_head(self, header: Header, payload_size: int) -> bytes:
        """Return the header of the success reply to a command, for a payload that follows in pieces.

        Args:
            header: the command's header, the object that `receive` returned.
            payload_size: bytes of the reply's payload.

        Returns:
            The header; nothing if the command asked for no reply, and then no payload may follow.

        Raises:
            LocalProtocolError: it is another command's turn.
        """
        msg_id, number, _size, flags, _error = header
        if flags & NO_REPLY and number != _VERSION:
            return b""
        if number == _VERSION:
            raise LocalProtocolError("answer VERSION with accept() or error_reply(); nothing is sent")
        queue = self._unanswered
        if not queue or queue[0] is not header:
            raise self._out_of_turn(header)
        queue.popleft()
        return pack_header(msg_id, number, HEADER_SIZE + payload_size, REPLY)

    def error_reply(self, header: Header, errno: int) -> bytes:
        """Return the error reply to a command; to refuse VERSION with it ends the connection.

        Args:
            header: the command's header, the object that `receive` returned.
            errno: error number; one that cannot be on the wire becomes EIO.

        Returns:
            The whole message, never with a payload; nothing if the command asked for no reply.

        Raises:
            LocalProtocolError: it is another command's turn.
        """
        if header.flags & NO_REPLY and header.command != _VERSION:
            return b""
        self._take_turn(header)
        if header.command == _VERSION:
            self._move(PhaseEvent.REFUSED)
        return pack_error_reply(header, errno if 0 < errno <= MAX_ERRNO else _errno.EIO)

    def accept(self, header: Header, offer: VersionCapabilities, *, grant_twin: bool = False) -> bytes:
        """Agree on what the client proposed, and return the reply to its VERSION.

        Args:
            header: the VERSION command's header, the object that `receive` returned.
            offer: what this server can do.
            grant_twin: whether a twin socket may be granted. Whether it was is in `negotiated.twin`; the
                reply then
                has to carry one descriptor, the client's end.

        Returns:
            The whole message. It is due even if the command asked for no reply.

        Raises:
            LocalProtocolError: there is no VERSION to accept.

        Spec: vfio-user, VFIO_USER_VERSION.
        """
        if self.proposal is None or self.role is not ConnectionEnd.SERVER:
            raise LocalProtocolError("there is no VERSION command to accept; nothing is sent")
        self._take_turn(header)
        agreement = negotiate(self.proposal, offer, request_payload_size=self._proposal_size, grant_twin=grant_twin)
        self._agree(agreement)
        payload = agreement.reply_payload
        return pack_header(header.msg_id, _VERSION, HEADER_SIZE + len(payload), REPLY) + payload

    def _take_turn(self, header: Header) -> None:
        queue = self._unanswered
        if not queue or queue[0] is not header:
            raise self._out_of_turn(header)
        queue.popleft()

    def _out_of_turn(self, header: Header) -> LocalProtocolError:
        due = command_name(self._unanswered[0].command) if self._unanswered else "nothing"
        what = f"{command_name(header.command)} #{header.msg_id}"
        return LocalProtocolError(f"{what} cannot be answered now, {due} is due; nothing is sent")

    # --- Commanding ---

    @property
    def outstanding(self) -> Mapping[int, Outstanding]:
        """Our commands that wait for a reply, by id."""
        return MappingProxyType(self._outstanding)

    def propose(
        self, capabilities: VersionCapabilities, *, minor: int = PROTOCOL_MINOR, token: Any = None
    ) -> tuple[int, bytes]:
        """Return the VERSION command that a client starts with.

        Args:
            capabilities: what this client can do.
            minor: highest minor to propose.
            token: see `command`.

        Returns:
            The id and the whole message.

        Raises:
            LocalProtocolError: this is a server, or VERSION was sent before.
        """
        return self.command(Command.VERSION, encode_version(capabilities, minor), token)

    def command(self, command: int, payload: bytes, token: Any = None, *, no_reply: bool = False) -> tuple[int, bytes]:
        """Return a command of ours, with an id that is not in use.

        Args:
            command: command number.
            payload: its payload.
            token: comes back with the reply.
            no_reply: whether the peer shall not answer; the token is not kept then.

        Returns:
            The id and the whole message.

        Raises:
            LocalProtocolError: it is not for this side, or not in this phase, to send; or every id is in use.
        """
        spec = COMMANDS.get(command)
        if spec is None or spec.sender is not self.role or spec.phase is not self.phase:
            who = f"a {self.role.value} that is {self.phase.value}"
            raise LocalProtocolError(f"{who} cannot send {command_name(command)}; nothing is sent")
        if no_reply and not spec.no_reply:
            raise LocalProtocolError(f"{spec.command.name} is always answered; nothing is sent")
        if spec.needs is not None and not getattr(self.negotiated, spec.needs):
            raise LocalProtocolError(f"{spec.command.name} needs {spec.needs} of both sides; nothing is sent")
        if command == _VERSION:
            if self.proposal is not None:
                raise LocalProtocolError("VERSION was sent before; nothing is sent")
            self.proposal = parse_version_request(payload)
        msg_id = self.ids.next(self._outstanding, self._forgotten)
        flags = COMMAND
        if no_reply:
            flags |= NO_REPLY
            self._posted.append(msg_id)
        else:
            self._outstanding[msg_id] = _new(Outstanding, (spec, token))
        return msg_id, pack_header(msg_id, command, HEADER_SIZE + len(payload), flags) + payload

    def forget(self, msg_id: int) -> None:
        """Give up a command of ours; its reply will be dropped when it comes.

        Args:
            msg_id: what `command` returned; an id that is not outstanding any more is left alone.
        """
        if self._outstanding.pop(msg_id, None) is not None:
            self._forgotten.add(msg_id)

    # --- The rest ---

    def new_framer(self) -> Framer:
        """Return a framer for one of this connection's sockets, with this end's limits."""
        return Framer(self._limits.max_message_size, self._limits.accepted_msg_fds)

    def close(self) -> list[Outstanding]:
        """End the connection; may be called at any time and again.

        Returns:
            Our commands that will not be answered any more.
        """
        self._move(PhaseEvent.ENDED)
        given_up = list(self._outstanding.values())
        self._outstanding.clear()
        self._forgotten.clear()
        self._posted.clear()
        self._unanswered.clear()
        return given_up

    def _move(self, event: PhaseEvent) -> None:
        try:
            self.phase = TRANSITIONS[self.phase, event]
        except KeyError:
            raise LocalProtocolError(f"a session that is {self.phase.value} cannot take this: {event.value}") from None
        if self.phase is ConnectionPhase.CLOSED:
            self._legal = self._legal_on_twin = {}

    def _agree(self, agreement: Negotiated) -> None:
        self._move(PhaseEvent.AGREED)
        self.negotiated = agreement
        legal = {
            number: spec
            for number, spec in COMMANDS.items()
            if spec.sender is self.role.peer
            and spec.phase is self.phase
            and (spec.needs is None or getattr(agreement, spec.needs))
        }
        # The twin carries what the server commands; so for the client commands come there, for the server
        # replies.
        if agreement.twin and self.role is ConnectionEnd.CLIENT:
            self._legal_on_twin = legal
        else:
            self._legal = legal
        self._replies_on_main = not (agreement.twin and self.role is ConnectionEnd.SERVER)
