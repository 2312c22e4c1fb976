"""Interrupts of a real function beyond the everyday: MSI, ERR, kernels without resize, and refusals in their midst."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakevfio import FakeKernel
from fakevfio.bed import answer, copies, eventfds, given, irq_request, session
from fakevfio.device import MSI_INDEX, MSIX_INDEX, NORESIZE
from vfiouser_protocol.constants import IrqIndex
from vfiouser_protocol.errors import CommandError

ASSIGN, DISABLE, LOOP_BACK, MASK_EVENTFD = 0x24, 0x21, 0x22, 0x0C


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    """A machine with one function."""
    return FakeKernel(tmp_path)


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """Eight eventfds."""
    made = eventfds(8)
    yield made
    for fd in made:
        os.close(fd)


async def test_msi_grows_by_being_enabled_anew(kernel: FakeKernel, fds: list[int]) -> None:
    """MSI cannot be resized on any kernel: vectors that a client adds later work, and the earlier ones go on."""
    async with session(kernel) as client:
        assert client.description.irqs[MSI_INDEX].flags & NORESIZE
        await answer(client.set_irqs(irq_request(MSI_INDEX, ASSIGN, 0, 1), copies(fds[0])))
        await answer(client.set_irqs(irq_request(MSI_INDEX, ASSIGN, 3, 1), copies(fds[3])))
        assert {MSI_INDEX: 4} == kernel.device.enabled
        for vector in (0, 3):
            kernel.device.fire(MSI_INDEX, vector)
            assert 1 == os.eventfd_read(fds[vector])
        await answer(client.set_irqs(irq_request(MSI_INDEX, LOOP_BACK, 0, 4, b"\x01\x00\x00\x00"), []))
        assert 1 == os.eventfd_read(fds[0])
        assert {"MSI": 2} == client.irq_summary()
        await answer(client.set_irqs(irq_request(MSI_INDEX, DISABLE), []))
        assert {} == kernel.device.enabled


async def test_a_refused_growth_leaves_the_vectors_that_there_were(kernel: FakeKernel, fds: list[int]) -> None:
    """When the kernel refuses the bigger set, the smaller one is on again with the same eventfds."""
    kernel.device.dynamic_msix = False
    before = set(os.listdir("/proc/self/fd"))
    async with session(kernel) as client:
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 0, 2), copies(*fds[:2])))
        with pytest.raises(CommandError, match="not an eventfd") as refused:
            await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 2, 1), given(os.memfd_create("x"))))
        assert errno.EINVAL == refused.value.errno
        assert {MSIX_INDEX: 2} == kernel.device.enabled
        for vector in (0, 1):
            kernel.device.fire(MSIX_INDEX, vector)
            assert 1 == os.eventfd_read(fds[vector])
        assert {"MSIX": 2} == client.irq_summary()
    assert before == set(os.listdir("/proc/self/fd"))


async def test_a_vector_without_eventfd_stays_without_when_others_come(kernel: FakeKernel, fds: list[int]) -> None:
    """A vector that was taken away is not brought back when the set grows later."""
    kernel.device.dynamic_msix = False
    async with session(kernel) as client:
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 0, 2), copies(*fds[:2])))
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 1, 1), []))
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 2, 1), copies(fds[2])))
        for vector in range(3):
            kernel.device.fire(MSIX_INDEX, vector)
        assert [1, 1] == [os.eventfd_read(fds[0]), os.eventfd_read(fds[2])]
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fds[1])


@pytest.mark.parametrize("index", [IrqIndex.ERR, IrqIndex.REQ])
async def test_errors_and_requests_reach_the_client(kernel: FakeKernel, fds: list[int], index: IrqIndex) -> None:
    """AER errors and the kernel's wish for the device are eventfds of the client, to be taken away and set anew."""
    async with session(kernel) as client:
        for fd in fds[:2]:
            await answer(client.set_irqs(irq_request(index, ASSIGN, 0, 1), copies(fd)))
            kernel.device.fire(index, 0)
            assert 1 == os.eventfd_read(fd)
            assert {index.name: 1} == client.irq_summary()
        await answer(client.set_irqs(irq_request(index, ASSIGN, 0, 1), []))
        assert {} == client.irq_summary()
        kernel.device.fire(index, 0)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fds[1])
        await answer(client.set_irqs(irq_request(index, DISABLE), []))


async def test_mask_eventfds_are_the_kernels_affair(kernel: FakeKernel, fds: list[int]) -> None:
    """What a kernel has no eventfd for is refused with its errno, and the line goes on working."""
    async with session(kernel) as client:
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 0, 1), copies(fds[0])))
        with pytest.raises(CommandError, match="cannot mask or unmask") as refused:
            await answer(client.set_irqs(irq_request(MSIX_INDEX, MASK_EVENTFD, 0, 1), copies(fds[1])))
        assert errno.ENOTTY == refused.value.errno
        kernel.device.fire(MSIX_INDEX, 0)
        assert 1 == os.eventfd_read(fds[0])
