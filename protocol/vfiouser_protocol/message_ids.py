"""Which id the next command of ours gets."""

from __future__ import annotations

from collections.abc import Container, Sized
from typing import Protocol

from vfiouser_protocol.errors import LocalProtocolError

IDS = 1 << 16


class _Used(Sized, Container[int], Protocol):
    """Ids that are in use."""


class MessageIds:
    """The ids of one end of a connection, one after the other.

    Attributes:
        foreign: ids of commands that another process may have sent on the connection before us; never ours.
    """

    __slots__ = ("_last", "foreign")

    def __init__(self) -> None:
        self.foreign = range(0)
        self._last = 0

    def use_half(self, life: int) -> None:
        """Use only half of all ids.

        Args:
            life: counts the processes that have had this end; two that follow each other use different halves.
        """
        half = IDS // 2
        self.foreign = range(half, IDS) if life % 2 == 0 else range(half)
        self._last = self.foreign.stop % IDS

    def next(self, outstanding: _Used, forgotten: _Used) -> int:
        """Return an id that is not in use.

        Args:
            outstanding: ids whose replies are awaited.
            forgotten: ids whose replies may still come.

        Raises:
            LocalProtocolError: there is none.
        """
        if len(outstanding) + len(forgotten) + len(self.foreign) >= IDS:
            raise LocalProtocolError(f"all {IDS} message ids wait for replies; nothing is sent")
        msg_id = self._last
        while True:
            msg_id = (msg_id + 1) % IDS
            if msg_id in self.foreign:
                msg_id = self.foreign.stop % IDS
            if msg_id not in outstanding and msg_id not in forgotten:
                self._last = msg_id
                return msg_id
