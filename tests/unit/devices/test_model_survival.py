"""What the next process makes of a model and its client: a restart loses nothing, and a crash is seen."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import trio
import trio.testing

from successorkit import Notes
from vfiouser_oob.devices import model as authoring
from vfiouser_oob.devices.base import BackendUnavailable, ClientLink
from vfiouser_oob.devices.model_backend import ModelBackend, ModelSession
from vfiouser_oob.devices.models.test_device import TestDevice
from vfiouser_oob.transport.fds import OwnedFd, close_fds
from vfiouser_protocol.capabilities import VersionCapabilities
from vfiouser_protocol.constants import IrqIndex, IrqSetFlags
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.messages import DmaMap, DmaUnmap, SetIrqs

_ASSIGN = int(IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER)
_RAISE = int(IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER)
_UNMASK_BY = int(IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_UNMASK)
_MASK = int(IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_MASK)
_SCRATCH, _LINE = 4, 0x14


class Link(ClientLink):
    """A client of which everything is kept."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.capabilities = VersionCapabilities()
        self.lost: str | None = None

    async def dma_read(self, address: int, count: int) -> bytes:
        """Zeros."""
        await trio.lowlevel.checkpoint()
        return bytes(count)

    async def dma_write(self, address: int, data: bytes) -> None:
        """Nothing."""
        await trio.lowlevel.checkpoint()

    def fail(self, reason: str) -> None:
        """It is lost."""
        self.lost = reason

    def recovered(self) -> None:
        """It is there again."""
        self.lost = None


class Forgetful(TestDevice):
    """The test device without snapshots."""

    snapshot_version = None


class Newer(TestDevice):
    """The test device of another version of the program."""

    snapshot_version = 2


class Broken(TestDevice):
    """One that does not understand what it has written itself."""

    __qualname__ = TestDevice.__qualname__
    __module__ = TestDevice.__module__

    async def restore(self, state: bytes) -> None:
        """Refuse."""
        await trio.lowlevel.checkpoint()
        raise ValueError("the state makes no sense")


@pytest.fixture
def notes() -> Iterator[Notes]:
    """A journal, and what a manager keeps."""
    notes = Notes()
    yield notes
    notes.close()


def _eventfds(count: int) -> list[OwnedFd]:
    return [OwnedFd(os.eventfd(0, os.EFD_NONBLOCK)) for _ in range(count)]


def _request(flags: int, index: int, count: int, start: int = 0) -> SetIrqs:
    return SetIrqs(20, flags, index, start, count)


async def first_life(device: authoring.DeviceModel, notes: Notes, *, leaves: bool, client: Sequence[OwnedFd]) -> None:
    """A process in which a client sets up a model; it ends in order, or is killed."""
    backend = ModelBackend(device)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.run)
        session = await backend.open(Link(notes))
        assert isinstance(session, ModelSession)
        session.region_write(7, 4, b"\x06\x00", posted=False)
        session.region_write(0, _SCRATCH, b"abcd", posted=False)
        session.region_write(2, 0, b"mine", posted=False)
        session.dma_map(DmaMap(32, 3, 0, 0x1000, 0x1000), ())
        session.set_irqs(_request(_ASSIGN, IrqIndex.MSIX, 2), [fd.duplicate() for fd in client[:2]])
        session.set_irqs(_request(_ASSIGN, IrqIndex.INTX, 1), [client[2].duplicate()])
        session.set_irqs(_request(_UNMASK_BY, IrqIndex.INTX, 1), [client[3].duplicate()])
        session.set_irqs(_request(_MASK, IrqIndex.MSIX, 1, start=1), ())
        session.region_write(0, 0x10, bytes((1, 0, IrqIndex.MSIX, 0)), posted=False)  # it waits to be unmasked
        session.region_write(0, _LINE, b"\1\0\0\0", posted=False)
        assert os.eventfd_read(client[2].fileno()) == 1
        if leaves:
            await session.quiesce()
            session.leave()
        nursery.cancel_scope.cancel()
    await session.close()
    backend.close()


async def second_life(
    notes: Notes, device: authoring.DeviceModel, nursery: trio.Nursery
) -> tuple[ModelSession, Link, ModelBackend]:
    """The next process, which goes on with the client."""
    backend = ModelBackend(device)
    nursery.start_soon(backend.run)
    link, left = Link(notes), notes.inherited()
    session = await backend.resume(link, left)
    left.close()
    assert isinstance(session, ModelSession)
    return session, link, backend


def _count(fd: OwnedFd) -> int:
    try:
        return os.eventfd_read(fd.fileno())
    except BlockingIOError:
        return 0


async def _end(session: ModelSession, backend: ModelBackend, nursery: trio.Nursery) -> None:
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await session.close()
    backend.close()


def test_a_restart_loses_nothing(notes: Notes) -> None:
    """Registers, config space, mapped memory, DMA ranges, eventfds, masks, latches and the level of INTx go on."""

    async def main() -> None:
        client = _eventfds(4)
        await first_life(TestDevice("f0"), notes, leaves=True, client=client)
        async with trio.open_nursery() as nursery:
            session, link, backend = await second_life(notes, TestDevice("f0"), nursery)
            assert link.lost is None
            assert notes.left is None
            assert session.region_read(0, _SCRATCH, 4) == b"abcd"
            assert session.region_read(7, 4, 2) == b"\x06\x00"
            assert session.region_read(2, 0, 4) == b"mine"
            assert session.memory.map.find(0x1000) is not None
            assert [_count(fd) for fd in client] == [0, 0, 0, 0]
            os.eventfd_write(client[3].fileno(), 1)  # the line is asserted still, so it fires when it is unmasked
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert _count(client[2]) == 1
            session.set_irqs(_request(_ASSIGN, IrqIndex.MSIX, 1, start=1), [client[1].duplicate()])
            session.set_irqs(
                _request(int(IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK), IrqIndex.MSIX, 1, start=1), ()
            )
            assert _count(client[1]) == 1
            await _end(session, backend, nursery)
        close_fds(client)

    trio.run(main)


@pytest.mark.parametrize(
    ("first", "then", "leaves", "reason"),
    [
        (TestDevice, TestDevice, False, "killed"),
        (Forgetful, Forgetful, True, "no snapshots"),
        (TestDevice, Newer, True, "of version 1"),
        (TestDevice, Broken, True, "makes no sense"),
    ],
)
def test_what_cannot_be_gone_on_with_waits_for_a_reset(
    notes: Notes, first: type[TestDevice], then: type[TestDevice], leaves: bool, reason: str
) -> None:
    """The client is told, in words; its reset makes a new device, with the memory and the eventfds as they were."""

    async def main() -> None:
        client = _eventfds(4)
        await first_life(first("f0"), notes, leaves=leaves, client=client)
        async with trio.open_nursery() as nursery:
            session, link, backend = await second_life(notes, then("f0"), nursery)
            assert reason in str(link.lost)
            session.reset()
            assert link.lost is None
            assert session.region_read(0, _SCRATCH, 4) == bytes(4)
            assert session.memory.map.find(0x1000) is not None
            session.region_write(0, 0x10, bytes((0, 0, IrqIndex.MSIX, 0)), posted=False)
            assert _count(client[0]) == 1
            await _end(session, backend, nursery)
        close_fds(client)

    trio.run(main)


def test_what_was_begun_is_done_once(notes: Notes) -> None:
    """An unmap that was done may be done again, an interrupt that was raised may not."""

    async def main() -> None:
        client = _eventfds(4)
        await first_life(TestDevice("f0"), notes, leaves=False, client=client)
        async with trio.open_nursery() as nursery:
            session, _, backend = await second_life(notes, TestDevice("f0"), nursery)
            session.command_begins(1, again=True)
            session.dma_unmap(DmaUnmap(24, 0, 0x1000, 0x1000))
            session.dma_unmap(DmaUnmap(24, 0, 0x1000, 0x1000))
            with pytest.raises(CommandError) as refused:
                session.set_irqs(_request(_RAISE, IrqIndex.MSIX, 1), ())
            assert refused.value.errno == errno.EIO
            session.set_irqs(_request(_RAISE, IrqIndex.MSIX, 0), ())  # all off, which can be done twice
            session.command_begins(2, again=False)
            with pytest.raises(CommandError):
                session.dma_unmap(DmaUnmap(24, 0, 0x1000, 0x1000))
            assert not notes.ranges
            assert not [place for place in notes.eventfds if place[0] == IrqIndex.MSIX]
            await _end(session, backend, nursery)
        close_fds(client)

    trio.run(main)


def test_memory_that_was_not_kept_turns_the_client_out(notes: Notes) -> None:
    """What the client has mapped must be what the device has."""

    async def main() -> None:
        client = _eventfds(4)
        await first_life(TestDevice("f0"), notes, leaves=True, client=client)
        backend = ModelBackend(TestDevice("f0"))
        left = notes.inherited()
        missing = replace(left, regions={index: fd for index, fd in left.regions.items() if index != 2})
        with pytest.raises(BackendUnavailable, match="not kept"):
            await backend.resume(Link(notes), missing)
        left.close()
        backend.close()
        close_fds(client)

    trio.run(main)


def test_a_transfer_that_was_asked_for_is_done_by_the_next_process(notes: Notes) -> None:
    """The device has come to rest, so what its client asks for then is in the snapshot."""

    async def main() -> None:
        device = TestDevice("f0")
        backend = ModelBackend(device)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.run)
            session = await backend.open(Link(notes))
            session.region_write(7, 4, b"\x06\x00", posted=False)
            session.dma_map(DmaMap(32, 3, 0, 0x1000, 0x1000), ())
            session.region_write(1, 0, b"full", posted=False)
            session.region_write(0, 0x18, (0x1000).to_bytes(8, "little"), posted=False)
            session.region_write(0, 0x20, (4).to_bytes(4, "little"), posted=False)
            await session.quiesce()
            session.region_write(0, 0x24, (1).to_bytes(4, "little"), posted=False)
            await trio.testing.wait_all_tasks_blocked()
            assert session.region_read(0, 0x28, 4) == b"\1\0\0\0"
            session.leave()
            nursery.cancel_scope.cancel()
        await session.close()
        backend.close()
        async with trio.open_nursery() as nursery:
            resumed, _, backend = await second_life(notes, TestDevice("f0"), nursery)
            await trio.testing.wait_all_tasks_blocked()
            assert resumed.region_read(0, 0x28, 4) == b"\2\0\0\0"
            assert resumed.region_read(1, 0, 4) == bytes(4)
            await _end(resumed, backend, nursery)

    trio.run(main)
