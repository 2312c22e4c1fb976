"""What a session makes of a message: a command to execute, a reply to a command of ours, or a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from vfiouser_protocol.commands import CommandSpec
from vfiouser_protocol.errors import ReplyError
from vfiouser_protocol.framing import Descriptor
from vfiouser_protocol.header import Header, command_name, errno_text

NO_FDS: tuple[Descriptor, ...] = ()


class CommandReceived(NamedTuple):
    """A command of the peer that has to be executed and answered.

    Args:
        spec: its row of the command table.
        header: its header; hand this very object to `Session.reply` or `Session.error_reply`.
        payload: its payload, at least as long as the fixed part.
        fds: the file descriptors that mean something to it.
        surplus_fds: file descriptors that mean nothing and have to be closed.
    """

    spec: CommandSpec
    header: Header
    payload: bytes
    fds: Sequence[Descriptor]
    surplus_fds: Sequence[Descriptor] = NO_FDS


class ReplyReceived(NamedTuple):
    """The peer's answer to a command of ours.

    Args:
        token: what was given to `Session.command`.
        header: the reply's header.
        payload: its payload. libvfio-user adds one even to some errors; it means nothing there.
        fds: the file descriptors that mean something to it.
        surplus_fds: file descriptors that mean nothing and have to be closed.
    """

    token: Any
    header: Header
    payload: bytes
    fds: Sequence[Descriptor]
    surplus_fds: Sequence[Descriptor] = NO_FDS

    @property
    def error(self) -> ReplyError | None:
        """The error that the peer answered with, if it did."""
        if not self.header.is_error:
            return None
        name = command_name(self.header.command)
        return ReplyError(f"the peer refused {name}: {errno_text(self.header.error)}", self.header.error)


class MessageRefused(NamedTuple):
    """A message that nobody has to look at any further.

    Args:
        errno: why, as an error number.
        reply: the error reply to send in its turn, None if there must be none.
        fds: the file descriptors that came with it; all have to be closed.
        reason: a sentence for the log.
        close: whether the connection ends, once `reply` is sent.
    """

    errno: int
    reply: bytes | None
    fds: Sequence[Descriptor]
    reason: str
    close: bool


class Outstanding(NamedTuple):
    """A command of ours that waits for its reply.

    Args:
        spec: its row of the command table.
        token: what was given to `Session.command`.
    """

    spec: CommandSpec
    token: Any
