"""What the daemon asks a server on behalf of somebody's command, so that another process never asks it twice.

The next process starts an unfinished command again, and asks the same things in the same order. It does not repeat a
question that has its answer. Nor does it repeat one that the server has got: servers answer in order, so that answer
comes behind all others that were due when the process ended.
"""

from __future__ import annotations

from vfiouser_oob.client.calls import Reply
from vfiouser_oob.persist.stream_memory import Asked, StreamMemory
from vfiouser_protocol.constants import HEADER_SIZE, Command
from vfiouser_protocol.header import ERROR, REPLY, Header

#: What changes something when it is asked. All else may be asked again.
_KEPT = frozenset(
    {
        Command.REGION_READ,
        Command.REGION_WRITE,
        Command.REGION_WRITE_MULTI,
        Command.DMA_MAP,
        Command.DMA_UNMAP,
        Command.DEVICE_SET_IRQS,
        Command.DEVICE_RESET,
    }
)
#: Whose success says nothing that is not known, and so need not be kept for all parts of a command.
_SILENT = _KEPT - {Command.REGION_READ, Command.REGION_WRITE_MULTI}
_NOBODY = -1


class CallLedger:
    """What was asked for one command of the client at a time.

    Args:
        memory: of the server's socket; it stays the caller's.
    """

    def __init__(self, memory: StreamMemory) -> None:
        self._memory = memory
        self._prior: Asked | None = memory.asked
        self._tag = _NOBODY
        self._number = 0
        self._id = _NOBODY

    def begin(self, tag: int, *, again: bool) -> None:
        """A command of the client begins.

        Args:
            tag: which, modulo 2^16.
            again: a process before us has begun it already.
        """
        self._tag, self._number = tag, 0
        if self._prior is not None and not (again and self._prior.tag == tag):
            self._prior = None

    def known(self, command: int) -> Reply | None:
        """The answer to what is about to be asked, if a process before us got it.

        Args:
            command: number of the command.
        """
        if command not in _KEPT or self._tag == _NOBODY:
            return None
        self._number += 1
        prior = self._prior
        if prior is None:
            return None
        if self._number < prior.number and command in _SILENT:
            return Reply(Header(0, command, HEADER_SIZE, REPLY, 0), b"")
        if self._number < prior.number:
            return None
        self._prior = None
        if not prior.answered or prior.payload is None:
            return None
        flags = REPLY | (ERROR if prior.error else 0)
        return Reply(Header(prior.id, command, HEADER_SIZE + len(prior.payload), flags, prior.error), prior.payload)

    def asking(self, command: int, id: int) -> None:
        """A command is about to be sent.

        Args:
            command: its number.
            id: its message id.
        """
        if command in _KEPT and self._tag != _NOBODY:
            self._id = id
            self._memory.ask(self._tag, self._number, id)

    def heard(self, header: Header, payload: bytes) -> None:
        """A reply has come, and was not taken yet.

        Args:
            header: its header.
            payload: what follows.
        """
        prior = self._prior
        if header.msg_id == self._id:
            self._id = _NOBODY
            self._memory.hear(self._tag, self._number, header.msg_id, header.error, payload)
        elif prior is not None and not prior.answered and header.msg_id == prior.id:
            self._memory.hear(prior.tag, prior.number, prior.id, header.error, payload)
            self._prior = self._memory.asked
