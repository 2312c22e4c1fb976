"""What can go wrong with an agent, as one class per reason that a caller would treat differently.

    AgentError
    ├── ConnectError       nobody answers there
    ├── AuthError          TLS failed, or the agent does not let us in
    ├── TransportLost      the connection ended while the call was under way
    ├── DeadlineExceeded   the agent gave up waiting for its device
    ├── Busy               not now; try again
    ├── Unsupported        this agent or function cannot do that
    ├── NotFound           no such function, session or method's object
    ├── InvalidArgument    a parameter cannot be right
    ├── InvalidState       the call does not fit the state that the function is in
    ├── Incompatible       the state of that source cannot run on this destination
    ├── CorruptState       digest or length do not fit
    ├── NoResources        the agent's limits are reached
    ├── DeviceFailed       the function is broken until it is reset
    └── ProtocolError      one side does not speak the protocol

Each class carries what the daemon needs: the errno for the VMM, whether the call may be repeated, and what is known
about the function afterwards. The class attribute `code` is what the reference protocol sends. The class also says
whether the call can have reached the agent. The code that sent the call may know better, and says so in `delivery`.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import ClassVar

#: Characters of a message that are kept: an agent chooses it, and it ends in logs and in `status`.
MAX_MESSAGE = 2000


class Retry(Enum):
    """Whether the same call may be made again."""

    #: Repeating it would end the same way, or do harm.
    NO = "no"
    #: Repeat it, with growing pauses.
    YES = "yes"
    #: Connect again and ask `status` first; only what `status` does not show as done is repeated.
    RECONNECT = "reconnect"


class FunctionCertainty(Enum):
    """What is known about the function after the error."""

    #: As before the call.
    UNCHANGED = "unchanged"
    #: The call may or may not have had its effect; only `status` tells.
    UNKNOWN = "unknown"
    #: It does not work until it is reset.
    FAILED = "failed"


class AgentError(Exception):
    """Base of all errors of agents; raised itself only for codes of a newer protocol.

    Args:
        message: one line for people: what came, what was allowed, what happens now.
        vendor_code: the vendor's own number or word, if there is one.
    """

    code: ClassVar[str] = "error"
    errno: ClassVar[int] = errno.EIO
    retry: ClassVar[Retry] = Retry.NO
    fate: ClassVar[FunctionCertainty] = FunctionCertainty.UNKNOWN
    #: Nothing of the call was sent, as far as the class tells.
    undelivered: ClassVar[bool] = False
    #: It is no answer: nobody was reached, or whoever it was has gone.
    away: ClassVar[bool] = False

    def __init__(self, message: str, *, vendor_code: str | None = None) -> None:
        message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}…"
        super().__init__(message)
        self.message = message
        self.vendor_code = vendor_code
        #: Nothing of the call can have reached the agent, so it has changed nothing.
        self.unsent = self.undelivered
        #: It may have had its effect all the same.
        self.unclear = self.fate is FunctionCertainty.UNKNOWN

    @property
    def retryable(self) -> bool:
        """The call may be made again, at once or after `status`."""
        return self.retry is not Retry.NO

    @property
    def fatal(self) -> bool:
        """Only a reset brings the function back."""
        return self.fate is FunctionCertainty.FAILED

    def __str__(self) -> str:
        return f"{self.message} (vendor code {self.vendor_code})" if self.vendor_code else self.message


class ConnectError(AgentError):
    """The agent cannot be reached; nothing was sent."""

    code = "connect"
    errno = errno.ENOTCONN
    retry = Retry.YES
    fate = FunctionCertainty.UNCHANGED
    undelivered = True
    away = True


class AuthError(AgentError):
    """TLS failed, the agent refuses us, or plain text would leave this host."""

    code = "auth"
    errno = errno.EACCES
    fate = FunctionCertainty.UNCHANGED
    undelivered = True
    away = True


class TransportLost(AgentError):
    """The connection ended before the answer came."""

    code = "transport-lost"
    errno = errno.EIO
    retry = Retry.RECONNECT
    away = True


class DeadlineExceeded(AgentError):
    """The agent's own time limit for its device is over. (A caller's deadline is its cancel scope.)"""

    code = "deadline"
    errno = errno.ETIMEDOUT


class Busy(AgentError):
    """The function or the agent is occupied for the moment."""

    code = "busy"
    errno = errno.EBUSY
    retry = Retry.YES
    fate = FunctionCertainty.UNCHANGED


class Unsupported(AgentError):
    """The agent or this function cannot do that; its capabilities do not claim it."""

    code = "unsupported"
    errno = errno.ENOTSUP
    fate = FunctionCertainty.UNCHANGED


class NotFound(AgentError):
    """The function or session does not exist."""

    code = "not-found"
    errno = errno.ENODEV
    fate = FunctionCertainty.UNCHANGED


class InvalidArgument(AgentError):
    """A parameter cannot be right, whatever the state."""

    code = "invalid-argument"
    errno = errno.EINVAL
    fate = FunctionCertainty.UNCHANGED


class InvalidState(AgentError):
    """The call does not fit the function's state or the session's role."""

    code = "invalid-state"
    errno = errno.EBUSY
    fate = FunctionCertainty.UNCHANGED


class Incompatible(AgentError):
    """The function described cannot go on here.

    Args:
        reasons: one line for each difference, naming both sides.
        message: one line for all; made of the reasons if left out.
        vendor_code: the vendor's own number or word, if there is one.
    """

    code = "incompatible"
    errno = errno.EINVAL
    fate = FunctionCertainty.UNCHANGED

    def __init__(self, reasons: Sequence[str], message: str = "", *, vendor_code: str | None = None) -> None:
        super().__init__(message or "incompatible: " + "; ".join(reasons), vendor_code=vendor_code)
        self.reasons = tuple(reasons)


class CorruptState(AgentError):
    """Digest, length or structure of the state do not fit; the state was not applied."""

    code = "corrupt-state"
    errno = errno.EILSEQ
    fate = FunctionCertainty.UNCHANGED


class NoResources(AgentError):
    """The agent has no room for this.

    Args:
        message: one line for people.
        limits: the room that the agent has, by name.
        vendor_code: the vendor's own number or word, if there is one.
    """

    code = "no-resources"
    errno = errno.ENOSPC
    fate = FunctionCertainty.UNCHANGED

    def __init__(
        self, message: str, limits: Mapping[str, int] | None = None, *, vendor_code: str | None = None
    ) -> None:
        super().__init__(message, vendor_code=vendor_code)
        self.limits = dict(limits or {})


class DeviceFailed(AgentError):
    """The function does not work any more; only a reset ends this."""

    code = "device-failed"
    errno = errno.EIO
    fate = FunctionCertainty.FAILED


class ProtocolError(AgentError):
    """One side sent what the protocol does not allow; the connection is closed."""

    code = "protocol"
    errno = errno.EPROTO


#: Every class by the code that stands for it on the wire.
ERRORS: Mapping[str, type[AgentError]] = {
    kind.code: kind
    for kind in (
        AgentError,
        ConnectError,
        AuthError,
        TransportLost,
        DeadlineExceeded,
        Busy,
        Unsupported,
        NotFound,
        InvalidArgument,
        InvalidState,
        Incompatible,
        CorruptState,
        NoResources,
        DeviceFailed,
        ProtocolError,
    )
}
