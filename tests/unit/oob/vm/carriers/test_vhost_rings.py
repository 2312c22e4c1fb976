"""The companion's queues with memory, kicks and calls that a test made: who waits for whom, and what is closed when."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from vfiouser_oob.transport.fds import ForeignFd
from vfiouser_oob.transport.reaper import REAPER, Account
from vfiouser_oob.vm.carriers import vhost_rings
from vfiouser_oob.vm.carriers.vhost_messages import MemoryTable, VhostRegion, VringAddress
from vfiouser_oob.vm.carriers.vhost_rings import Rings

GUEST, USER, SIZE = 0x10_0000, 0x7F00_0000, 0x1_0000
DESCRIPTORS, AVAILABLE, USED, REQUEST, ANSWER = 0, 0x1000, 0x2000, 0x3000, 0x4000


class Bed:
    """Queues, and the guest's side of one of them."""

    def __init__(self) -> None:
        self.account = Account("test")
        self.marked: list[tuple[int, int]] = []
        self.rings = Rings(self.account, lambda address, length: self.marked.append((address, length)))
        self.memory = os.memfd_create("guest")
        os.ftruncate(self.memory, SIZE)
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self._sent = 0

    def lend(self, number: int) -> ForeignFd:
        """A descriptor as it comes with a message."""
        return ForeignFd(os.dup(number), self.account)

    def set_up(self, base: int = 0) -> None:
        """Say what QEMU says, and start."""
        table = MemoryTable(1, 0, (VhostRegion(GUEST, SIZE, USER, 0),))
        self.rings.set_memory(table, [self.lend(self.memory)])
        self.rings.set_size(0, 4)
        self.rings.set_address(VringAddress(0, 0, USER + DESCRIPTORS, USER + USED, USER + AVAILABLE, 0))
        self.rings.set_kick(0, self.lend(self.kick))
        self.rings.set_call(0, self.lend(self.call))
        self.rings.start({0: base})

    def request(self, unique: int) -> None:
        """Make a request available."""
        os.pwrite(self.memory, struct.pack("<IIQ", 40, 26, unique), REQUEST)
        rows = struct.pack("<QIHHQIHH", GUEST + REQUEST, 40, 1, 1, GUEST + ANSWER, 80, 2, 0)
        os.pwrite(self.memory, rows, DESCRIPTORS)
        self._sent += 1
        os.pwrite(self.memory, struct.pack("<HH", 0, self._sent), AVAILABLE)

    async def called(self) -> None:
        """Wait for the interrupt."""
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(self.call)
        os.eventfd_read(self.call)

    def answer(self) -> tuple[int, int, int]:
        """The answer's head."""
        return struct.unpack("<IiQ", os.pread(self.memory, 16, ANSWER))


@asynccontextmanager
async def bed() -> AsyncIterator[Bed]:
    """Queues that run; at the end everything that was lent is closed."""
    made = Bed()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.rings.run)
        yield made
        nursery.cancel_scope.cancel()
    made.rings.close()
    with trio.fail_after(10):
        while made.account.held:
            await trio.lowlevel.checkpoint()
    assert REAPER.settle(5)
    for number in (made.memory, made.kick, made.call):
        os.close(number)


async def test_requests_are_refused_when_they_come() -> None:
    """One that waited already, and one that is kicked; both are marked, and the stop knows how many there were."""
    async with bed() as made:
        made.request(1)
        made.set_up()
        await made.called()
        assert made.answer() == (16, -5, 1)
        made.request(2)
        os.eventfd_write(made.kick, 1)
        await made.called()
        assert made.answer() == (16, -5, 2)
        assert await made.rings.stop() == {0: 2}
        assert (GUEST + ANSWER, 16) in made.marked
        assert (GUEST + USED + 2, 2) in made.marked


async def test_nothing_is_served_after_a_stop() -> None:
    """Until it is started again, from where it was."""
    async with bed() as made:
        made.set_up()
        bases = await made.rings.stop()
        made.request(1)
        os.eventfd_write(made.kick, 1)
        await wait_all_tasks_blocked(0.05)
        assert made.answer() == (0, 0, 0)
        made.rings.start(bases)
        await made.called()
        assert made.answer() == (16, -5, 1)


async def test_what_is_replaced_is_closed_once_the_thread_is_through() -> None:
    """Memory, kick and call while it waits; the new ones are used from then on."""
    async with bed() as made:
        made.set_up()
        await wait_all_tasks_blocked(0.05)
        made.rings.set_memory(MemoryTable(1, 0, (VhostRegion(GUEST, SIZE, USER, 0),)), [made.lend(made.memory)])
        made.rings.set_kick(0, made.lend(made.kick))
        made.rings.set_call(0, made.lend(made.call))
        with trio.fail_after(10):
            while made.account.held != 3:
                await trio.lowlevel.checkpoint()
        made.request(1)
        os.eventfd_write(made.kick, 1)
        await made.called()


async def test_a_queue_without_sense_is_left_alone() -> None:
    """A number of waiting requests that cannot be, and addresses outside of memory."""
    async with bed() as made:
        os.pwrite(made.memory, struct.pack("<HH", 0, 100), AVAILABLE)
        made.set_up()
        await wait_all_tasks_blocked(0.05)
        assert await made.rings.stop() == {}
        made.rings.set_address(VringAddress(0, 0, 1, 2, 3, 0))
        made.rings.start({0: 0})
        await wait_all_tasks_blocked(0.05)
        assert await made.rings.stop() == {}


async def test_a_thread_that_is_held_up_does_not_hold_up_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call whose counter is full and that blocks: its owner holds up one thread, and nobody else."""
    async with bed() as made:
        full = os.eventfd((1 << 32) - 1)
        os.eventfd_write(full, (1 << 64) - 2 - ((1 << 32) - 1))
        made.request(1)
        made.set_up()
        made.rings.set_call(0, made.lend(full))
        await made.rings.stop()
        monkeypatch.setattr(vhost_rings, "PATIENCE_S", 0.05)
        try:
            made.rings.start({0: 0})
            await wait_all_tasks_blocked(0.05)
            with trio.fail_after(5):
                await made.rings.stop()
        finally:
            os.eventfd_read(full)
            os.close(full)
