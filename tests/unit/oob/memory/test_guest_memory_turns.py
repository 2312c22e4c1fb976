"""Accesses that run over very many ranges."""

from __future__ import annotations

import os

import trio

from vfiouser_oob.memory.guest import GuestMemory
from vfiouser_oob.memory.recorder import SentWrite
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.messages import DmaMap

WINDOWS = 6_000
WIDTH = 4


class NoMessages:
    """A client that is never asked."""

    async def dma_read(self, address: int, count: int) -> bytes:
        """Not used."""
        raise AssertionError

    async def dma_write(self, address: int, data: bytes) -> None:
        """Not used."""
        raise AssertionError

    def bus_write(self, address: int, data: bytes) -> SentWrite:
        """Not used."""
        raise AssertionError


async def test_an_access_to_thousands_of_ranges_lets_others_run() -> None:
    """Memory in windows of a few bytes is read and written right, and not in one go."""
    memory = GuestMemory(NoMessages(), WINDOWS, by_message=False, check_files=True)
    fd = OwnedFd(os.memfd_create("windows"))
    os.ftruncate(fd.fileno(), WINDOWS * WIDTH)
    for number in range(WINDOWS):
        # Backwards, so that no two windows that follow each other do so in the file.
        offset = (WINDOWS - 1 - number) * WIDTH
        with fd.duplicate() as sent:
            memory.add(DmaMap(32, 3, offset, number * WIDTH, WIDTH), [sent], memory.examine([sent]))
    fd.close()
    steps = 0

    async def other() -> None:
        nonlocal steps
        while True:
            steps += 1
            await trio.lowlevel.checkpoint()

    data = os.urandom(WINDOWS * WIDTH)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await memory.write(0, data)
        written = steps
        assert data == await memory.read(0, len(data))
        nursery.cancel_scope.cancel()
    assert written > 3
    assert steps > written + 3
    memory.close()
