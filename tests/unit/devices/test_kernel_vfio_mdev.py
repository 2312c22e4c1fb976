"""Mediated devices: why one cannot be had, the memory that stays mapped, and what their drivers do otherwise."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakevfio import FakeKernel, FakeMigration
from fakevfio.bed import NoMessages, answer, copies, given, map_request, running, session, unmap_request
from fakevfio.kernel import GROUP, UUID
from fakevfio.migration import PRE_COPY, RUNNING
from vfiouser_agents.errors import NotFound
from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_protocol.errors import CommandError

MIB = 1 << 20
GIB = 1 << 30
OTHER = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    """A machine with a mediated device, reached by its group."""
    return FakeKernel(tmp_path, mdev=True)


@pytest.fixture
def memory() -> Iterator[int]:
    """A client's memory."""
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 4 * MIB)
    yield fd
    os.close(fd)


def remove(kernel: FakeKernel) -> None:
    """Take the device away."""
    path = kernel.mdev(UUID)
    for link in path.iterdir():
        link.unlink()
    path.rmdir()


def another(kernel: FakeKernel) -> None:
    """The device is another one."""
    remove(kernel)
    kernel.add_mdev(OTHER, "8")


def no_types(kernel: FakeKernel) -> None:
    """No driver makes mediated devices."""
    remove(kernel)
    (kernel.sysfs / "class/mdev_bus").rename(kernel.sysfs / "class/other")


def no_driver(kernel: FakeKernel) -> None:
    """The device was unbound."""
    (kernel.mdev(UUID) / "driver").unlink()


def other_kind(kernel: FakeKernel) -> None:
    """A cryptographic adapter of a mainframe."""
    (kernel.mdev(UUID) / "mdev_type/device_api").write_text("vfio-ap\n")


def no_group(kernel: FakeKernel) -> None:
    """A driver that has nothing to do with VFIO."""
    (kernel.mdev(UUID) / "iommu_group").unlink()


def no_permission(kernel: FakeKernel) -> None:
    """The node is root's."""
    kernel.open_errors[GROUP] = errno.EACCES


def no_node(kernel: FakeKernel) -> None:
    """The type 1 module is not loaded."""
    (kernel.dev / "vfio" / "vfio").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            remove,
            f"there is no mediated device {UUID}: there is none at all; create it with `echo {UUID} > TYPE/create`",
        ),
        (another, f"there is no mediated device {UUID}: this machine has: {OTHER}"),
        (no_types, "no driver of this machine makes mediated devices"),
        (no_driver, f"has no driver: remove it with `echo 1 > .*/{UUID}/remove`"),
        (other_kind, "is of the kind vfio-ap; only vfio-pci can be served"),
        (no_group, "has no IOMMU group: its driver mtty does not give it to VFIO"),
        (no_permission, f"no permission to open .*/{GROUP}: .*`chown USER /dev/vfio/{GROUP}`"),
        (no_node, "is not there .*modprobe vfio_iommu_type1"),
    ],
)
async def test_each_obstacle_has_its_words(kernel: FakeKernel, spoil: Callable[[FakeKernel], None], words: str) -> None:
    """What is missing and what helps, in one line, and no descriptor is left."""
    spoil(kernel)
    async with running(kernel) as backend:
        with pytest.raises(BackendUnavailable, match=words) as refused:
            await backend.open(NoMessages())
        assert "\n" not in str(refused.value)
    assert {} == kernel.nodes


async def test_many_devices_are_not_all_listed(kernel: FakeKernel) -> None:
    """An error stays readable on a machine with hundreds of them."""
    remove(kernel)
    for number in range(20):
        kernel.add_mdev(f"{OTHER[:-3]}2{number:02}", str(100 + number))
    async with running(kernel) as backend:
        with pytest.raises(BackendUnavailable, match=r"and 12 more$"):
            await backend.open(NoMessages())


async def test_its_agent_knows_it_by_its_uuid(kernel: FakeKernel) -> None:
    """The driver's migration is that of this device, which has no PCI address."""
    kernel.migration = FakeMigration()
    async with running(kernel) as backend:
        agent = backend.agent()
        (function,) = await agent.functions()
        assert (UUID, None) == (function.function_id, function.bdf)
        assert UUID == (await agent.open(UUID)).function_id
        with pytest.raises(NotFound):
            await agent.open(OTHER)


async def test_memory_stays_mapped_as_long_as_for_the_device(kernel: FakeKernel, memory: int) -> None:
    """Its driver looks pages up when it wants them, through this process; nothing of it stays afterwards."""
    os.pwrite(memory, b"client", 3 * MIB)
    async with session(kernel) as client:
        await answer(client.dma_map(map_request(0x1000_0000, 2 * MIB, offset=2 * MIB), copies(memory)))
        await answer(client.dma_map(map_request(0x2000_0000, MIB), copies(memory)))
        assert b"client" == kernel.iommu.dma(0x1010_0000, None, 6)
        assert 2 == len(kernel.views)
        with pytest.raises(CommandError):
            await answer(client.dma_map(map_request(0x1010_0000, MIB), copies(memory)))
        assert 2 == len(kernel.views)
        await answer(client.dma_unmap(unmap_request(0x1000_0000, 2 * MIB)))
        assert 1 == len(kernel.views)
        await answer(client.dma_unmap_all())
        assert {} == kernel.views
        await answer(client.dma_map(map_request(0x1000_0000, MIB), copies(memory)))
        assert 1 == len(kernel.views)
    assert {} == kernel.views
    assert [] == kernel.iommu.ranges


async def test_every_piece_of_a_big_range_goes(kernel: FakeKernel) -> None:
    """A range that was mapped in several calls is dropped as a whole."""
    fd = os.memfd_create("big")
    os.ftruncate(fd, 3 * GIB)
    async with session(kernel) as client:
        await answer(client.dma_map(map_request(4 * GIB, 2 * GIB + MIB), given(fd)))
        assert 3 == len(kernel.views)
        await answer(client.dma_unmap(unmap_request(4 * GIB, 2 * GIB + MIB)))
        assert {} == kernel.views


@pytest.mark.parametrize(("by_file", "kept"), [(True, 0), (False, 1)])
async def test_with_an_iommufd(tmp_path: Path, memory: int, by_file: bool, kept: int) -> None:
    """What is mapped by its file is the kernel's; what is mapped by an address has to stay there."""
    kernel = FakeKernel(tmp_path, iommufd=True, mdev=True)
    kernel.map_file = by_file
    async with session(kernel) as client:
        await answer(client.dma_map(map_request(0x1000_0000, MIB), copies(memory)))
        assert kept == len(kernel.views)
        kernel.iommu.dma(0x1000_0000, b"driver")
        assert b"driver" == os.pread(memory, 6, 0)
        await answer(client.dma_unmap(unmap_request(0x1000_0000, MIB)))
        assert {} == kernel.views


async def test_no_address_is_out_of_reach(kernel: FakeKernel, memory: int) -> None:
    """Without an IOMMU there is no window, and a file that is too short shows when its pages are wanted only."""
    async with session(kernel) as client:
        for address in (0xFEE0_0000, 1 << 60):
            await answer(client.dma_map(map_request(address, MIB), copies(memory)))
        await answer(client.dma_map(map_request(0, 64 * MIB), copies(memory)))


async def test_a_driver_that_migrates_can_be_reset(kernel: FakeKernel) -> None:
    """It may forget to say so, as mtty does, though a reset is the way out of every state of a migration."""
    kernel.device.tells_reset = False
    async with session(kernel) as client:
        assert not client.description.flags & 1
        with pytest.raises(CommandError, match="no way to reset"):
            await answer(client.reset())
    kernel.migration = FakeMigration()
    async with session(kernel) as client:
        assert client.description.flags & 1
        before = kernel.device.resets
        await answer(client.reset())
        assert before + 1 == kernel.device.resets


async def test_a_migration_that_a_dead_daemon_left_is_ended(kernel: FakeKernel) -> None:
    """Closing such a device ends its streams, but not the state; the next client gets a function that runs."""
    kernel.migration = FakeMigration()
    kernel.migration.sticky = True
    kernel.migration.state = PRE_COPY
    async with running(kernel) as backend:
        client = await backend.open(NoMessages())
        assert RUNNING == kernel.migration.state
        await client.close()


async def test_one_that_cannot_be_ended_keeps_the_device(kernel: FakeKernel) -> None:
    """A function in an unknown state is no client's; the reason is told, and all is closed."""
    kernel.migration = FakeMigration()
    kernel.migration.state = PRE_COPY
    kernel.device.has_reset = False
    async with running(kernel) as backend:
        with pytest.raises(
            BackendUnavailable, match="is left in a migration that is over, and its reset failed: Invalid arg"
        ):
            await backend.open(NoMessages())
    assert {} == kernel.nodes
