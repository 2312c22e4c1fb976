"""A real function over the end of its process: nothing is done to it, and the next process knows what there is."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from fakevfio import FakeKernel
from fakevfio.bed import NoMessages, answer, copies, irq_request, map_request, running, unmap_request
from fakevfio.device import MSIX_INDEX
from fakevfio.kernel import UUID
from successorkit import Notes
from vfiouser_oob.config.schema import VfioInterface
from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.devices.kernel_vfio.backend import KernelVfioBackend
from vfiouser_oob.devices.kernel_vfio.session import KernelVfioSession
from vfiouser_protocol.errors import CommandError

CONFIG = 7
ASSIGN, DISABLE, RAISE = 0x24, 0x21, 0x21
MIB = 1 << 20


@pytest.fixture(params=[VfioInterface.GROUP, VfioInterface.CDEV])
def kernel(request: pytest.FixtureRequest, tmp_path: Path) -> FakeKernel:
    """A machine with one function, by each interface."""
    return FakeKernel(tmp_path, iommufd=request.param is VfioInterface.CDEV)


@pytest.fixture
def memory() -> Iterator[int]:
    """A client's memory: 8 MiB."""
    fd = os.memfd_create("client")
    os.ftruncate(fd, 8 * MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def notes(kernel: FakeKernel) -> Iterator[Notes]:
    """What is kept, with copies of the kernel's handles."""
    notes = Notes(kernel.copy)
    yield notes
    notes.close()
    for _, fd in notes.kernel.values():
        kernel.close(fd.detach())
    assert kernel.nodes == {}
    assert kernel.views == {}


def link(notes: Notes) -> NoMessages:
    """A client of which everything is kept."""
    client = NoMessages()
    client.notes = notes
    return client


@asynccontextmanager
async def process(kernel: FakeKernel, notes: Notes, *, first: bool = False) -> AsyncIterator[KernelVfioSession]:
    """A process that leaves the device to the next."""
    async with running(kernel) as backend:
        left = notes.inherited()
        try:
            session = await (backend.open(link(notes)) if first else backend.resume(link(notes), left))
        finally:
            for _, fd in left.kernel:
                with suppress(ValueError):  # what was taken is the backend's
                    kernel.close(fd.detach())
            left.close()
        assert isinstance(session, KernelVfioSession)
        try:
            yield session
        finally:
            session.leave()
            await session.close()


async def test_nothing_happens_to_the_device(kernel: FakeKernel, notes: Notes, memory: int) -> None:
    """Mappings, interrupts and registers stay; the next process unmaps and re-assigns what this one did, once."""
    eventfd = os.eventfd(0)
    async with process(kernel, notes, first=True) as client:
        await answer(client.region_write(CONFIG, 4, b"\x06\x00", posted=False))
        await answer(client.region_write(0, 0x10, b"abcd", posted=False))
        await answer(client.dma_map(map_request(0, 2 * MIB), copies(memory)))
        await answer(client.dma_map(map_request(4 * MIB, MIB, offset=2 * MIB), copies(memory)))
        await answer(client.dma_map(map_request(16 * MIB, MIB), ()))
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 0, 2), copies(eventfd, eventfd)))
    before, calls, resets = list(kernel.iommu.ranges), list(kernel.device.irq_calls), kernel.device.resets
    async with process(kernel, notes) as client:
        assert (resets, calls, before) == (kernel.device.resets, kernel.device.irq_calls, kernel.iommu.ranges)
        assert await answer(client.region_read(0, 0x10, 4)) == b"abcd"
        assert client.irq_summary() == {"MSIX": 2}
        await answer(client.dma_unmap(unmap_request(4 * MIB, MIB)))
        await answer(client.dma_unmap(unmap_request(16 * MIB, MIB)))
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 2, 1), copies(eventfd)))
        with pytest.raises(CommandError):
            await answer(client.dma_unmap(unmap_request(4 * MIB, MIB)))
    async with process(kernel, notes) as client:
        assert before[:1] == kernel.iommu.ranges
        assert client.irq_summary() == {"MSIX": 3}
        await answer(client.set_irqs(irq_request(MSIX_INDEX, DISABLE), ()))
        assert MSIX_INDEX not in kernel.device.vectors
        await answer(client.dma_unmap_all())
        assert kernel.iommu.ranges == []
        assert kernel.device.resets == resets
    os.close(eventfd)


async def test_vectors_that_cannot_be_added_are_enabled_anew_with_those_of_before(
    kernel: FakeKernel, notes: Notes
) -> None:
    """Where the kernel wants all eventfds at once, the next process has those that the client has given before."""
    kernel.device.dynamic_msix = False
    eventfds = [os.eventfd(0) for _ in range(3)]
    async with process(kernel, notes, first=True) as client:
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 0, 2), copies(*eventfds[:2])))
    async with process(kernel, notes) as client:
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 2, 1), copies(eventfds[2])))
        for vector, eventfd in enumerate(eventfds):
            os.eventfd_write(kernel.device.vectors[MSIX_INDEX][vector], 1)
            assert os.eventfd_read(eventfd) == 1
    for eventfd in eventfds:
        os.close(eventfd)


async def test_what_was_begun_is_done_once(kernel: FakeKernel, notes: Notes, memory: int) -> None:
    """Killed behind each of its steps, a command ends as if it had been done once; what cannot is refused."""
    eventfd = os.eventfd(0)
    async with process(kernel, notes, first=True) as client:
        await answer(client.dma_map(map_request(0, MIB), copies(memory)))
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 0, 1), copies(eventfd)))
    async with process(kernel, notes) as client:
        client.command_begins(1, again=True)
        await answer(client.dma_map(map_request(0, MIB), copies(memory)))  # mapped and noted
        assert len(kernel.iommu.ranges) == 1
        await answer(client.dma_unmap(unmap_request(0, MIB)))
        await answer(client.dma_unmap(unmap_request(0, MIB)))  # unmapped and noted
        assert kernel.iommu.ranges == []
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 0, 1), copies(eventfd)))
        with pytest.raises(CommandError) as refused:
            await answer(client.set_irqs(irq_request(MSIX_INDEX, RAISE, 0, 1), ()))
        assert refused.value.errno == errno.EIO
        with pytest.raises(CommandError) as refused:
            await answer(client.region_write(0, 0x10, b"abcd", posted=False))
        assert refused.value.errno == errno.EIO
        await answer(client.region_write(CONFIG, 4, b"\x06\x00", posted=False))
        kernel.device.set_irqs(bytearray(irq_bytes(DISABLE)))  # done by the process that was killed
        await answer(client.set_irqs(irq_request(MSIX_INDEX, DISABLE), ()))
        client.command_begins(2, again=False)
        with pytest.raises(CommandError):
            await answer(client.dma_unmap(unmap_request(0, MIB)))
    os.close(eventfd)


def irq_bytes(flags: int) -> bytes:
    """A SET_IRQS of the kernel's, without data."""
    return b"".join(number.to_bytes(4, "little") for number in (20, flags, MSIX_INDEX, 0, 0))


async def test_a_handle_that_was_not_kept_turns_the_client_out(kernel: FakeKernel, notes: Notes) -> None:
    """And the device is given back, as it always is."""
    async with process(kernel, notes, first=True):
        pass
    number = next(iter(notes.kernel))
    kernel.close(notes.kernel.pop(number)[1].detach())
    with pytest.RaisesGroup(pytest.RaisesExc(BackendUnavailable, match="not kept"), flatten_subgroups=True):
        async with process(kernel, notes):
            pass


def test_a_mediated_device_does_not_outlive_its_process(tmp_path: Path) -> None:
    """Its driver would look for memory in a process that is no more."""
    assert not KernelVfioBackend(FakeKernel(tmp_path, mdev=True), UUID).survives
