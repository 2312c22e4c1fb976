"""Messages that stand between a socket and its process: not answered, or not sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vfiouser_oob.transport.fds import OwnedFd


class HeldMessage:
    """A message that is in its socket still.

    Args:
        size: its bytes there.
        with_fds: whether descriptors are attached to it.
    """

    __slots__ = ("settled", "size", "with_fds")

    def __init__(self, size: int, with_fds: bool) -> None:
        self.size = size
        self.with_fds = with_fds
        #: It needs no answer.
        self.settled = False


class PutOff(NamedTuple):
    """A message that waits for room.

    Args:
        data: what of it is not sent.
        fds: copies of its descriptors.
        answer: whether it is an answer.
    """

    data: memoryview
    fds: Sequence[OwnedFd]
    answer: bool
