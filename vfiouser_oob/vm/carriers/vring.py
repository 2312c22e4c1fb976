"""A virtqueue's device side, as much of it as is needed to say no to each request, without any I/O of its own.

A guest that mounts the companion would wait for ever for an answer. So each request is given back at once, with an
error in it if there is room for one.

Spec: VIRTIO 1.2, 2.7 (split virtqueues); Linux, fuse.h.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple, Protocol

_DESCRIPTOR = Struct("<QIHH")
_INDEX = Struct("<H")
_USED = Struct("<II")
#: The heads of a request and of an answer.
_REQUEST = Struct("<IIQ")
_ANSWER = Struct("<IiQ")
_NEXT = 1
_WRITE = 2
#: In the available ring: the driver wants no interrupt.
_NO_INTERRUPT = 1
#: Descriptors of the largest queue that is served: as many requests are refused in one go.
SIZE_MAX = 256


class VringError(Exception):
    """The driver's queue makes no sense; it is not served any more."""


class VringMemory(Protocol):
    """Guest memory by guest physical address."""

    def read(self, address: int, length: int) -> bytes:
        """Read bytes.

        Raises:
            VringError: there is no memory.
        """
        ...

    def write(self, address: int, data: bytes) -> None:
        """Write bytes.

        Raises:
            VringError: there is no memory.
        """
        ...


class VringPlace(NamedTuple):
    """Where a vring's parts are.

    Args:
        size: descriptors.
        descriptors: guest physical address of the descriptors.
        available: of the ring that the driver writes.
        used: of the ring that the device writes.
    """

    size: int
    descriptors: int
    available: int
    used: int


class Vring:
    """One virtqueue.

    Args:
        place: where it is.
        base: the first entry of the available ring to look at.
    """

    def __init__(self, place: VringPlace, base: int) -> None:
        self._place = place
        #: The next entry of the available ring to look at.
        self.base = base & 0xFFFF

    def serve(self, memory: VringMemory) -> bool:
        """Give back each request that waits, with an error.

        Args:
            memory: the guest's.

        Returns:
            Whether the driver is to be interrupted.

        Raises:
            VringError: the queue makes no sense.
        """
        place = self._place
        if not 0 < place.size <= SIZE_MAX or place.size & place.size - 1:
            raise VringError(f"a queue of {place.size} descriptors")
        flags, end = (_INDEX.unpack(memory.read(place.available + at, 2))[0] for at in (0, 2))
        waiting = end - self.base & 0xFFFF
        if waiting > place.size:
            raise VringError(f"{waiting} requests wait in a queue of {place.size}")
        for _ in range(waiting):
            at = place.available + 4 + 2 * (self.base % place.size)
            (head,) = _INDEX.unpack(memory.read(at, 2))
            written = self._refuse(memory, head)
            # As many have been given back as were taken: they are in order.
            (used,) = _INDEX.unpack(memory.read(place.used + 2, 2))
            memory.write(place.used + 4 + 8 * (used % place.size), _USED.pack(head, written))
            memory.write(place.used + 2, _INDEX.pack(used + 1 & 0xFFFF))
            self.base = self.base + 1 & 0xFFFF
        return bool(waiting) and not flags & _NO_INTERRUPT

    def _refuse(self, memory: VringMemory, head: int) -> int:
        """Write an error into a request, if it has room for one; returns how many bytes were written."""
        unique = None
        for address, length, flags in self._chain(memory, head):
            if not flags & _WRITE:
                if unique is None and length >= _REQUEST.size:
                    unique = _REQUEST.unpack(memory.read(address, _REQUEST.size))[2]
            elif unique is not None and length >= _ANSWER.size:
                memory.write(address, _ANSWER.pack(_ANSWER.size, -errno.EIO, unique))
                return _ANSWER.size
        return 0

    def _chain(self, memory: VringMemory, head: int) -> Iterator[tuple[int, int, int]]:
        index = head
        for _ in range(self._place.size):
            if index >= self._place.size:
                raise VringError(f"there is no descriptor {index}")
            at = self._place.descriptors + index * _DESCRIPTOR.size
            address, length, flags, index = _DESCRIPTOR.unpack(memory.read(at, _DESCRIPTOR.size))
            yield address, length, flags
            if not flags & _NEXT:
                return
        raise VringError("a chain of descriptors has no end")
