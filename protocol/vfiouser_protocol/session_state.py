"""The phases of a connection as tables: what moves it, and what happens with a message that no table expects.

These tables, with `commands.COMMANDS`, are all there is about phases; `session` only looks things up. What is
not listed is illegal.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from vfiouser_protocol.commands import ConnectionPhase


class PhaseEvent(Enum):
    """What moves a session from phase to phase."""

    AGREED = "VERSION was answered with success"
    REFUSED = "VERSION was answered with an error"
    BROKEN = "the peer broke a rule that ends the connection"
    ENDED = "the stream ended, or our side closed it"


#: Every legal move; any other is a bug of ours.
TRANSITIONS: Mapping[tuple[ConnectionPhase, PhaseEvent], ConnectionPhase] = MappingProxyType(
    {
        (ConnectionPhase.NEGOTIATING, PhaseEvent.AGREED): ConnectionPhase.READY,
        (ConnectionPhase.NEGOTIATING, PhaseEvent.REFUSED): ConnectionPhase.CLOSED,
        (ConnectionPhase.NEGOTIATING, PhaseEvent.BROKEN): ConnectionPhase.CLOSED,
        (ConnectionPhase.NEGOTIATING, PhaseEvent.ENDED): ConnectionPhase.CLOSED,
        (ConnectionPhase.READY, PhaseEvent.BROKEN): ConnectionPhase.CLOSED,
        (ConnectionPhase.READY, PhaseEvent.ENDED): ConnectionPhase.CLOSED,
        (ConnectionPhase.CLOSED, PhaseEvent.BROKEN): ConnectionPhase.CLOSED,
        (ConnectionPhase.CLOSED, PhaseEvent.ENDED): ConnectionPhase.CLOSED,
    }
)


class Oddity(Enum):
    """What can be wrong with a message before anybody looks at what it asks for."""

    BAD_TYPE = "its type is neither command nor reply"
    UNKNOWN = "there is no such command"
    WRONG_SENDER = "this side must not send it"
    WRONG_PHASE = "it is not legal in this phase"
    NOT_AGREED = "both sides must have announced it"
    SHORT = "its payload is shorter than the fixed part"
    WRONG_SOCKET = "it belongs to the other of the two sockets"
    LATE = "its command has been given up"
    POSTED = "its command asked for no reply"
    UNSOLICITED = "no command of ours has this id"
    MISMATCHED = "it names a different command than the one it answers"
    VERSION_FDS = "VERSION must not carry file descriptors"
    VERSION_BAD = "the two sides cannot agree"


class OddMessageVerdict(NamedTuple):
    """What happens with an odd message.

    Args:
        answer: whether its sender gets an EINVAL reply (never if NO_REPLY forbids it).
        close: whether the connection ends.
    """

    answer: bool
    close: bool


_ANSWER = OddMessageVerdict(answer=True, close=False)
_ANSWER_AND_CLOSE = OddMessageVerdict(answer=True, close=True)
_DROP = OddMessageVerdict(answer=False, close=False)
_CLOSE = OddMessageVerdict(answer=False, close=True)
#: For an oddity that a phase does not list.
WORST = _CLOSE

#: The server's side of negotiation follows libvfio-user: what is no VERSION command at all ends the
#: connection in silence, what is a command gets an answer first.
VERDICTS: Mapping[tuple[ConnectionPhase, Oddity], OddMessageVerdict] = MappingProxyType(
    {
        (ConnectionPhase.NEGOTIATING, Oddity.BAD_TYPE): _CLOSE,
        (ConnectionPhase.NEGOTIATING, Oddity.UNKNOWN): _ANSWER_AND_CLOSE,
        (ConnectionPhase.NEGOTIATING, Oddity.WRONG_SENDER): _ANSWER_AND_CLOSE,
        (ConnectionPhase.NEGOTIATING, Oddity.WRONG_PHASE): _ANSWER_AND_CLOSE,
        (ConnectionPhase.NEGOTIATING, Oddity.VERSION_FDS): _ANSWER_AND_CLOSE,
        (ConnectionPhase.NEGOTIATING, Oddity.VERSION_BAD): _ANSWER_AND_CLOSE,
        (ConnectionPhase.NEGOTIATING, Oddity.UNSOLICITED): _CLOSE,
        (ConnectionPhase.NEGOTIATING, Oddity.MISMATCHED): _CLOSE,
        (ConnectionPhase.NEGOTIATING, Oddity.LATE): _CLOSE,
        (ConnectionPhase.READY, Oddity.BAD_TYPE): _ANSWER,
        (ConnectionPhase.READY, Oddity.UNKNOWN): _ANSWER,
        (ConnectionPhase.READY, Oddity.WRONG_SENDER): _ANSWER,
        (ConnectionPhase.READY, Oddity.WRONG_PHASE): _ANSWER,
        (ConnectionPhase.READY, Oddity.NOT_AGREED): _ANSWER,
        (ConnectionPhase.READY, Oddity.SHORT): _ANSWER,
        (ConnectionPhase.READY, Oddity.LATE): _DROP,
        (ConnectionPhase.READY, Oddity.POSTED): _DROP,
        (ConnectionPhase.READY, Oddity.UNSOLICITED): _CLOSE,
        (ConnectionPhase.READY, Oddity.MISMATCHED): _CLOSE,
        (ConnectionPhase.READY, Oddity.WRONG_SOCKET): _CLOSE,
    }
)
