"""Errors of the protocol.

    VfioUserError
     ├── LocalProtocolError      our own side broke the rules: a bug in the caller
     ├── RemoteProtocolError     the peer broke the rules
     │    ├── CommandError       one command is refused with an errno; the connection goes on
     │    └── StreamError        the byte stream cannot be trusted any more; the connection ends
     ├── ReplyError              the peer refused a command of ours, with its errno
     └── DmaFault                an access to client memory that no mapping allows

Each carries `errno`, the number that goes (or came) on the wire, and a sentence that says what came, what was allowed
and what happens now.
"""

from __future__ import annotations

import errno as _errno


class VfioUserError(Exception):
    """Base of every error of this package.

    Args:
        message: what came, what was allowed, what happens now.
        errno: the error number that stands for it on the wire.
    """

    default_errno = _errno.EINVAL

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = self.default_errno if errno is None else errno


class LocalProtocolError(VfioUserError):
    """Our own side used the protocol wrongly."""

    default_errno = _errno.EIO


class RemoteProtocolError(VfioUserError):
    """The peer broke the rules of the protocol."""


class CommandError(RemoteProtocolError):
    """One command is refused; its reply carries `errno` and the connection goes on."""


class StreamError(RemoteProtocolError):
    """The peer's byte stream cannot be followed any further; the connection ends.

    Args:
        message: what came and why it cannot be followed.
        errno: error number for a last reply.
        reply: a last message to send before the connection is closed, if the peer can make use of one.
    """

    def __init__(self, message: str, errno: int | None = None, reply: bytes | None = None) -> None:
        super().__init__(message, errno)
        self.reply = reply


class ReplyError(VfioUserError):
    """The peer answered a command of ours with an error.

    Args:
        message: which command failed and how.
        errno: the peer's error number; 0 (legal on the wire) is read as EIO.
    """

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message, errno or _errno.EIO)


class DmaFault(VfioUserError):
    """An access to client memory that no mapping allows, or that the client could not serve."""

    default_errno = _errno.EFAULT
