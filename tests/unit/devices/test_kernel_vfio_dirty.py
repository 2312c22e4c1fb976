"""Dirty pages of the kernel's own migration where the function's driver cannot tell them."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fakevfio import FakeKernel, FakeMigration
from fakevfio.bed import NoMessages, answer, copies, map_request, running, unmap_request
from vfiouser_agents.api import DirtyReport, Range, Session
from vfiouser_oob.devices.kernel_vfio.session import KernelVfioSession

PAGE = 4096
BASE = 0x10_0000
SIZE = 16 * PAGE


@pytest.fixture
def memory() -> Iterator[int]:
    """A client's memory."""
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 16 * SIZE)
    yield fd
    os.close(fd)


def machine(root: Path, *, mdev: bool = False, iommufd: bool = False) -> FakeKernel:
    """A machine whose function migrates, but keeps no log."""
    kernel = FakeKernel(root, mdev=mdev, iommufd=iommufd)
    kernel.migration = FakeMigration()
    kernel.migration.has_log = False
    return kernel


@asynccontextmanager
async def used(kernel: FakeKernel) -> AsyncIterator[tuple[KernelVfioSession, Session]]:
    """A client's session, and its function's migration."""
    async with running(kernel) as backend:
        client = await backend.open(NoMessages())
        assert isinstance(client, KernelVfioSession)
        try:
            yield client, await backend.agent().open(kernel.name)
        finally:
            await client.close()


def pages(report: DirtyReport) -> set[int]:
    """Numbers of the pages that a report names."""
    assert report.bitmap is not None
    return {bit for bit in range(8 * len(report.bitmap)) if report.bitmap[bit // 8] >> bit % 8 & 1}


async def test_of_a_real_function_everything_is_dirty(tmp_path: Path, memory: int) -> None:
    """Every page that is mapped, every time: the IOMMU driver cannot know better."""
    async with used(machine(tmp_path)) as (client, session):
        assert session.caps.dirty
        await answer(client.dma_map(map_request(BASE, SIZE), copies(memory)))
        assert PAGE == await session.dirty_start([Range(0, 1 << 40)], PAGE)
        for _ in range(2):
            assert set(range(16)) == pages(await session.dirty_report(BASE, SIZE))
        assert {8, 9} == pages(await session.dirty_report(BASE - 8 * PAGE, 10 * PAGE))
        assert set() == pages(await session.dirty_report(BASE + SIZE, SIZE))
        await session.dirty_stop()
        await session.dirty_stop()
        await answer(client.dma_unmap(unmap_request(BASE, SIZE)))


async def test_pages_that_were_unmapped_count_once_more(tmp_path: Path, memory: int) -> None:
    """What was written until the unmapping is in the next report, unless something else is mapped there before."""
    async with used(machine(tmp_path)) as (client, session):
        for place in range(3):
            await answer(client.dma_map(map_request(BASE + place * SIZE, SIZE), copies(memory)))
        await session.dirty_start([Range(0, 1 << 40)], PAGE)
        await answer(client.dma_unmap(unmap_request(BASE, SIZE)))
        await answer(client.dma_unmap_all())
        assert set(range(16)) == pages(await session.dirty_report(BASE, 3 * SIZE))
        assert set() == pages(await session.dirty_report(BASE, 3 * SIZE))


async def test_of_a_mediated_device_what_its_driver_wrote(tmp_path: Path, memory: int) -> None:
    """The kernel sees these writes; what was not asked for stays until it is."""
    kernel = machine(tmp_path, mdev=True)
    async with used(kernel) as (client, session):
        await answer(client.dma_map(map_request(BASE, SIZE), copies(memory)))
        await session.dirty_start([Range(0, 1 << 40)], PAGE)
        for page in (1, 5, 12):
            kernel.iommu.dma(BASE + page * PAGE, b"driver")
        assert {1, 5} == pages(await session.dirty_report(BASE, 8 * PAGE))
        assert {4} == pages(await session.dirty_report(BASE + 8 * PAGE, 8 * PAGE))
        assert set() == pages(await session.dirty_report(BASE, SIZE))
        kernel.iommu.dma(BASE + 3 * PAGE, b"last")
        await answer(client.dma_unmap(unmap_request(BASE, SIZE)))
        await answer(client.dma_map(map_request(BASE + SIZE, SIZE), copies(memory)))
        assert {3} == pages(await session.dirty_report(BASE, 2 * SIZE))


async def test_memory_that_is_new_is_not_dirty_for_what_was_there(tmp_path: Path, memory: int) -> None:
    """Another mapping at the same place begins clean."""
    kernel = machine(tmp_path, mdev=True)
    async with used(kernel) as (client, session):
        await answer(client.dma_map(map_request(BASE, SIZE), copies(memory)))
        await session.dirty_start([Range(0, 1 << 40)], PAGE)
        kernel.iommu.dma(BASE, b"driver")
        await answer(client.dma_unmap(unmap_request(BASE, SIZE)))
        await answer(client.dma_map(map_request(BASE, SIZE), copies(memory)))
        assert set() == pages(await session.dirty_report(BASE, SIZE))


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOTTY])
async def test_a_log_that_cannot_be_read_is_not_used(tmp_path: Path, memory: int, number: int) -> None:
    """Kernels without the helper of such logs let them be found and started, and fail to read them."""
    kernel = machine(tmp_path)
    assert kernel.migration is not None
    kernel.migration.has_log, kernel.migration.log_errno = True, number
    async with used(kernel) as (client, session):
        await answer(client.dma_map(map_request(BASE, SIZE), copies(memory)))
        await session.dirty_start([Range(BASE, SIZE)], PAGE)
        assert kernel.migration.logging is None
        assert set(range(16)) == pages(await session.dirty_report(BASE, SIZE))
        await session.reset()
        assert kernel.iommu.dirty is None


async def test_nobody_logs(tmp_path: Path, memory: int) -> None:
    """With an iommufd and a driver's log that cannot be read, all is dirty; without any log nothing is claimed."""
    kernel = machine(tmp_path / "a", iommufd=True)
    async with used(kernel) as (_, session):
        assert not session.caps.dirty
    kernel = machine(tmp_path / "b", iommufd=True)
    assert kernel.migration is not None
    kernel.migration.has_log, kernel.migration.log_errno = True, errno.EOPNOTSUPP
    async with used(kernel) as (client, session):
        await answer(client.dma_map(map_request(BASE, SIZE), copies(memory)))
        await session.dirty_start([Range(BASE, SIZE)], PAGE)
        for _ in range(2):
            assert set(range(11)) == pages(await session.dirty_report(BASE, 11 * PAGE))
        await session.dirty_stop()
