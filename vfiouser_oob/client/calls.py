"""One command on its way: sent, not yet answered, answered, given up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import trio

from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.errors import LocalProtocolError, ReplyError, VfioUserError
from vfiouser_protocol.header import ERROR, Header, command_name, errno_text


class Reply(NamedTuple):
    """A reply without error.

    Args:
        header: its header.
        payload: what follows the header.
        fds: descriptors that came with it; the receiver of the reply owns them.
    """

    header: Header
    payload: bytes
    fds: Sequence[OwnedFd] = ()


class CallOwner(Protocol):
    """Where a call has to be signed off when nothing waits for it any more."""

    def forget(self, call: PendingCall) -> None:
        """Drop the call; its late reply will be dropped, too."""
        ...


class PendingCall:
    """One command that was sent. Exactly one task may wait for it.

    Args:
        owner: the connection.
        command: the command's number.
        holds_dma: whether a QEMU-like client serves no DMA until it is answered.
    """

    __slots__ = (
        "_error",
        "_owner",
        "_reply",
        "_task",
        "command",
        "done",
        "holds_dma",
        "msg_id",
        "sent_ns",
    )

    def __init__(self, owner: CallOwner, command: int, holds_dma: bool) -> None:
        self._owner = owner
        self._task: trio.lowlevel.Task | None = None
        self._reply: Reply | None = None
        self._error: VfioUserError | None = None
        self.command = command
        self.holds_dma = holds_dma
        self.msg_id = -1
        self.sent_ns = time.perf_counter_ns()
        #: Whether the outcome is known: `take` will not have to wait.
        self.done = False

    def complete(self, reply: Reply) -> None:
        """Deliver the reply (the connection's side)."""
        self._reply = reply
        self.done = True
        if self._task is not None:
            self._wake()

    def fail(self, error: VfioUserError) -> None:
        """Deliver that there will be no reply (the connection's side)."""
        self._error = error
        self.done = True
        if self._task is not None:
            self._wake()

    def _wake(self) -> None:
        assert self._task is not None
        task, self._task = self._task, None
        trio.lowlevel.reschedule(task)

    def take(self) -> Reply:
        """Return the reply of a call that is `done`.

        Raises:
            ReplyError: the server answered with an error.
            ServerGone: the connection ended before the reply came.
            LocalProtocolError: the call is not done, or its reply was taken already.
        """
        if self._error is not None:
            raise self._error
        reply, self._reply = self._reply, None
        if reply is None:
            raise LocalProtocolError(f"the reply to {command_name(self.command)} is not there or was taken already")
        if reply.header.flags & ERROR:
            for fd in reply.fds:
                fd.close()
            name = command_name(self.command)
            raise ReplyError(f"the server refused {name}: {errno_text(reply.header.error)}", reply.header.error)
        return reply

    async def wait(self) -> Reply:
        """Wait for the reply. When the wait is cancelled the call is forgotten and its late reply dropped.

        Raises:
            ReplyError: the server answered with an error.
            ServerGone: the connection ended before the reply came.
        """
        if not self.done:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
        return self.take()

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        self._owner.forget(self)
        return trio.lowlevel.Abort.SUCCEEDED

    def abandon(self) -> None:
        """Give up a call that nobody will wait for; a reply that is there or comes late is dropped."""
        if not self.done:
            self._owner.forget(self)
        elif self._reply is not None:
            reply, self._reply = self._reply, None
            for fd in reply.fds:
                fd.close()
