"""A client's use of a real function: registers, memory, interrupts, and what is left afterwards."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from fakevfio import FakeKernel
from fakevfio.bed import answer, copies, eventfds, given, irq_request, map_request, running, session, unmap_request
from fakevfio.device import BAR0_SIZE, MSIX_INDEX, PCIE
from vfiouser_oob.config.schema import RegionPolicy
from vfiouser_protocol.constants import IrqIndex
from vfiouser_protocol.errors import CommandError

CONFIG = 7
ASSIGN, DISABLE, MASK, UNMASK_EVENTFD = 0x24, 0x21, 0x09, 0x14
MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    """A machine with one function."""
    return FakeKernel(tmp_path)


@pytest.fixture
def memory() -> Iterator[int]:
    """A client's memory: 8 MiB."""
    fd = os.memfd_create("client")
    os.ftruncate(fd, 8 * MIB)
    yield fd
    os.close(fd)


# Regions


async def test_regions_are_the_kernels(kernel: FakeKernel) -> None:
    """Sizes, access, areas, offsets and the MSI-X capability come from the kernel; BARs come with the device."""
    async with session(kernel) as client:
        regions = client.description.regions
        assert [BAR0_SIZE, 0, 0x10000, 0, 32, 0, 0, 256, 0] == [region.size for region in regions]
        assert regions[0].mappable
        assert regions[0].msix_mappable
        assert ((0, 0x1000), (0x8000, 0x2000)) == regions[2].areas
        assert [0, 2 << 40] == [regions[0].offset, regions[2].offset]
        assert [True, False, True] == [region.mappable for region in regions[0:3]]
        assert not regions[4].mappable
        assert client.region_fd(0) == client.region_fd(2)
        file = client.region_fd(0)
        assert file is not None
        assert file.fileno() in kernel.nodes
        assert client.region_fd(CONFIG) is None
        assert client.region_fd(4) is None
        assert [1, 8, 65, 1, 1] == [irq.count for irq in client.description.irqs]
        assert 3 == client.description.flags
        assert (65535, 4096) == (client.limits.max_dma_maps, client.limits.pgsizes)


async def test_trap_policy_hands_out_nothing(kernel: FakeKernel) -> None:
    """With `trap` no region can be mapped and no descriptor leaves the daemon."""
    async with session(kernel, RegionPolicy.TRAP) as client:
        assert not any(region.mappable for region in client.description.regions)
        assert [None] * 9 == [client.region_fd(index) for index in range(9)]


@pytest.mark.parametrize(
    ("policy", "kernel_can", "by_dma_buf", "mappable"),
    [
        (RegionPolicy.AUTO, None, False, True),
        (RegionPolicy.AUTO, "export", False, True),
        (RegionPolicy.AUTO, "mmap", True, True),
        (RegionPolicy.DEVICE_FD, "mmap", False, True),
        (RegionPolicy.DMABUF, "export", False, False),
        (RegionPolicy.DMABUF, "mmap", True, True),
    ],
)
async def test_dma_buf_is_used_where_it_can_be_mapped(
    kernel: FakeKernel, policy: RegionPolicy, kernel_can: str | None, by_dma_buf: bool, mappable: bool
) -> None:
    """A dma-buf, whose offsets begin at 0, stands for a region only if the kernel can map it and the policy says so."""
    kernel.dma_buf = kernel_can
    async with session(kernel, policy) as client:
        assert mappable == client.description.regions[0].mappable
        fd = client.region_fd(0)
        assert mappable == (fd is not None)
        if fd is not None:
            assert ("dma-buf" if by_dma_buf else "device") == kernel.nodes[fd.fileno()].kind
        # Of a region in parts a dma-buf would count its bytes otherwise.
        assert (policy is not RegionPolicy.DMABUF) == client.description.regions[2].mappable
    assert {} == kernel.nodes
    assert {} == kernel.views


async def test_registers_by_system_calls(kernel: FakeKernel) -> None:
    """Reads and writes reach config space and BARs; a BAR that is not decoded is EIO, as reads from it are."""
    async with session(kernel) as client:
        assert b"\x36\x1b" == await answer(client.region_read(CONFIG, 0, 2))
        with pytest.raises(CommandError, match=r"4 bytes at 0x10 of region 0") as refused:
            await answer(client.region_read(0, 0x10, 4))
        assert errno.EIO == refused.value.errno
        await answer(client.region_write(CONFIG, 4, b"\x06\x00", posted=False))
        await answer(client.region_write(0, 0x10, b"abcd", posted=False))
        assert b"abcd" == await answer(client.region_read(0, 0x10, 4))
        whole = await answer(client.region_read(0, 0, BAR0_SIZE))
        assert BAR0_SIZE == len(whole)
        assert b"abcd" == whole[0x10:0x14]


async def test_resets_are_waited_for_in_a_thread(kernel: FakeKernel) -> None:
    """DEVICE_RESET, and config writes that start a reset, do not hold up the event loop."""
    async with session(kernel) as client:
        await answer(client.region_write(CONFIG, 4, b"\x06\x00", posted=False))
        reset = client.reset()
        assert reset is not None
        await reset
        assert 1 == kernel.device.resets
        assert 2 == kernel.device.command, "bus mastering is still on"
        flr = client.region_write(CONFIG, PCIE + 8, b"\x00\x80", posted=False)
        assert flr is not None
        later = client.region_write(CONFIG, 4, b"\x02\x00", posted=False)  # in order, behind the reset
        assert later is not None
        await flr
        await later
        assert 2 == kernel.device.resets
        assert 2 == kernel.device.command


async def test_a_function_without_reset_says_so(kernel: FakeKernel) -> None:
    """DEVICE_RESET is refused where the kernel knows no reset, and the flag is clear."""
    kernel.device.has_reset = False
    async with session(kernel) as client:
        assert 2 == client.description.flags
        with pytest.raises(CommandError, match="no way to reset"):
            client.reset()


# Memory


async def test_memory_is_mapped_at_the_clients_address(kernel: FakeKernel, memory: int) -> None:
    """The device reaches the client's file, with its permissions, and nothing of it stays mapped here."""
    async with session(kernel) as client:
        await answer(client.dma_map(map_request(0x4000_0000, MIB, offset=MIB), copies(memory)))
        await answer(client.dma_map(map_request(0, MIB, flags=1), copies(memory)))
        assert [(0, MIB, 1), (0x4000_0000, MIB, 3)] == kernel.iommu.ranges
        assert {} == kernel.views
        kernel.iommu.dma(0x4000_0010, b"from the device")
        assert b"from the device" == os.pread(memory, 15, MIB + 0x10)
        with pytest.raises(KeyError):
            kernel.iommu.dma(0x10, b"read-only")
        assert 2 == len(client.memory.map)
        await answer(client.dma_unmap(unmap_request(0x4000_0000, MIB)))
        assert [(0, MIB, 1)] == kernel.iommu.ranges
        await answer(client.dma_unmap_all())
        assert [] == kernel.iommu.ranges
        assert 0 == len(client.memory.map)


async def test_ranges_without_a_file_are_accepted(kernel: FakeKernel) -> None:
    """ROMs and the function's own BARs come without descriptor: known, never mapped, and taken back."""
    async with session(kernel) as client:
        await answer(client.dma_map(map_request(0xE000_0000, 0x4000), []))
        assert [] == kernel.iommu.ranges
        await answer(client.dma_unmap(unmap_request(0xE000_0000, 0x4000)))
        with pytest.raises(CommandError) as refused:
            await answer(client.dma_unmap(unmap_request(0xE000_0000, 0x4000)))
        assert errno.ENOENT == refused.value.errno


async def test_the_identical_mapping_again_is_no_error(kernel: FakeKernel, memory: int) -> None:
    """A client that repeats itself after an error is told yes, and the IOMMU has the range once."""
    async with session(kernel) as client:
        for _ in range(2):
            await answer(client.dma_map(map_request(0, MIB), copies(memory)))
        assert [(0, MIB, 3)] == kernel.iommu.ranges


@pytest.mark.parametrize(
    ("address", "size", "flags", "offset", "number", "words"),
    [
        (0x800, MIB, 3, 0, errno.EINVAL, "whole pages of 4096 bytes"),
        (0, 0x800, 3, 0, errno.EINVAL, "whole pages of 4096 bytes"),
        (0, MIB, 3, 0x200, errno.EINVAL, "whole pages of 4096 bytes"),
        (0xFEE0_0000, 0x1000, 3, 0, errno.EINVAL, "not inside what the IOMMU can address .0x0-0xfedfffff"),
        (1 << 48, 0x1000, 3, 0, errno.EINVAL, "not inside what the IOMMU can address"),
        (0, MIB, 0, 0, errno.EINVAL, "neither reading nor writing"),
        (0, 16 * MIB, 3, 0, errno.EFAULT, "the file is shorter than the range"),
    ],
)
async def test_impossible_maps_are_refused(
    kernel: FakeKernel, memory: int, address: int, size: int, flags: int, offset: int, number: int, words: str
) -> None:
    """What the IOMMU cannot map is refused with the reason; nothing stays behind, and the next map works."""
    async with session(kernel) as client:
        with pytest.raises(CommandError, match=words) as refused:
            await answer(client.dma_map(map_request(address, size, flags=flags, offset=offset), copies(memory)))
        assert number == refused.value.errno
        assert 0 == len(client.memory.map)
        assert [] == kernel.iommu.ranges
        await answer(client.dma_map(map_request(0, MIB), copies(memory)))


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (4 * MIB, f"{5 * MIB} bytes would be locked, and the limit of locked memory is {4 * MIB} .*LimitMEMLOCK="),
        (resource.RLIM_INFINITY, "the machine has not enough memory"),
    ],
)
async def test_overlap_limit_and_locked_memory(
    kernel: FakeKernel, memory: int, monkeypatch: pytest.MonkeyPatch, limit: int, words: str
) -> None:
    """Overlaps are EEXIST, too many ranges ENOSPC, and too little locked memory ENOMEM with what would help."""
    kernel.iommu.max_maps = 3
    kernel.iommu.memlock = 4 * MIB
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    async with session(kernel) as client:
        assert 3 == client.limits.max_dma_maps
        await answer(client.dma_map(map_request(0, MIB), copies(memory)))
        with pytest.raises(CommandError) as refused:
            await answer(client.dma_map(map_request(0x1000, MIB), copies(memory)))
        assert errno.EEXIST == refused.value.errno
        with pytest.raises(CommandError, match=words) as refused:
            await answer(client.dma_map(map_request(MIB, 4 * MIB), copies(memory)))
        assert errno.ENOMEM == refused.value.errno
        await answer(client.dma_map(map_request(MIB, MIB), copies(memory)))
        await answer(client.dma_map(map_request(2 * MIB, MIB), copies(memory)))
        with pytest.raises(CommandError) as refused:
            await answer(client.dma_map(map_request(3 * MIB, MIB), copies(memory)))
        assert errno.ENOSPC == refused.value.errno


async def test_files_that_may_not_be_written(kernel: FakeKernel, memory: int) -> None:
    """A descriptor opened for reading can be mapped for reading, and for nothing else."""
    async with session(kernel) as client:
        readable = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
        with pytest.raises(CommandError, match="does not allow") as refused:
            await answer(client.dma_map(map_request(0, MIB), copies(readable)))
        assert errno.EACCES == refused.value.errno
        await answer(client.dma_map(map_request(0, MIB, flags=1), given(readable)))
        assert [(0, MIB, 1)] == kernel.iommu.ranges


async def test_big_ranges_are_mapped_in_pieces(kernel: FakeKernel) -> None:
    """A range of many gigabytes is one for the client; a failure in the middle leaves nothing."""
    fd = os.memfd_create("big")
    os.ftruncate(fd, 5 * GIB)
    async with session(kernel) as client:
        await answer(client.dma_map(map_request(4 * GIB, 2 * GIB + MIB, offset=GIB), copies(fd)))
        assert [(4 * GIB, GIB, 3), (5 * GIB, GIB, 3), (6 * GIB, MIB, 3)] == kernel.iommu.ranges
        await answer(client.dma_unmap(unmap_request(4 * GIB, 2 * GIB + MIB)))
        assert [] == kernel.iommu.ranges
        with pytest.raises(CommandError):
            await answer(client.dma_map(map_request(4 * GIB, 4 * GIB, offset=2 * GIB), given(fd)))
        assert [] == kernel.iommu.ranges


async def test_a_map_that_takes_too_long_is_undone(kernel: FakeKernel, memory: int) -> None:
    """A client that was told ETIMEDOUT has nothing mapped, and its next command comes after the clean-up."""
    async with session(kernel) as client:
        kernel.gate.clear()
        mapping = client.dma_map(map_request(0, MIB), copies(memory))
        with trio.move_on_after(0.05) as scope:
            await answer(mapping)
        assert scope.cancelled_caught
        assert 0 == len(client.memory.map)
        kernel.gate.set()
        # Registers are read behind the mapping that is under way, not beside it.
        assert b"\x36\x1b" == await answer(client.region_read(CONFIG, 0, 2))
        assert [] == kernel.iommu.ranges
        await answer(client.dma_map(map_request(0, MIB), copies(memory)))
        assert [(0, MIB, 3)] == kernel.iommu.ranges


# Interrupts


async def test_eventfds_reach_the_kernel(kernel: FakeKernel) -> None:
    """An interrupt of the device is a count in the client's own eventfd; the daemon keeps none of them."""
    async with session(kernel) as client:
        fds = eventfds(4)
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 0, 4), copies(*fds)))
        kernel.device.fire(MSIX_INDEX, 2)
        assert 1 == os.eventfd_read(fds[2])
        assert {"MSIX": 4} == client.irq_summary()
        extra = eventfds(1)
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 5, 1), copies(extra[0])))
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 2, 1), []))  # no descriptor: taken away
        kernel.device.fire(MSIX_INDEX, 2)
        kernel.device.fire(MSIX_INDEX, 5)
        assert 1 == os.eventfd_read(extra[0])
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fds[2])
        await answer(client.set_irqs(irq_request(MSIX_INDEX, DISABLE), []))
        assert {} == kernel.device.enabled
        for fd in (*fds, *extra):
            os.close(fd)


async def test_split_eventfds_on_a_kernel_without_resize(kernel: FakeKernel) -> None:
    """Where vectors cannot be added, a command that reaches further enables all anew, the earlier ones included."""
    kernel.device.dynamic_msix = False
    async with session(kernel) as client:
        fds = eventfds(20)
        for start in (0, 8, 16):
            part = fds[start : start + 8]
            await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, start, len(part)), copies(*part)))
        assert {MSIX_INDEX: 20} == kernel.device.enabled
        for vector, fd in enumerate(fds):
            kernel.device.fire(MSIX_INDEX, vector)
            assert 1 == os.eventfd_read(fd)
        for fd in fds:
            os.close(fd)


async def test_intx_with_resample_and_mask(kernel: FakeKernel) -> None:
    """INTx takes an eventfd, mask, unmask and a resample eventfd; the kernel waits for that one itself."""
    async with session(kernel) as client:
        fd, resample = eventfds(2)
        await answer(client.set_irqs(irq_request(0, ASSIGN, 0, 1), copies(fd)))
        await answer(client.set_irqs(irq_request(0, MASK, 0, 1), []))
        await answer(client.set_irqs(irq_request(0, UNMASK_EVENTFD, 0, 1), copies(resample)))
        assert {0x10} == kernel.device.virqfds.keys()
        await answer(client.set_irqs(irq_request(0, UNMASK_EVENTFD, 0, 1), []))
        assert {} == kernel.device.virqfds
        kernel.device.fire(0, 0)
        assert 1 == os.eventfd_read(fd)
        os.close(fd)
        os.close(resample)


async def test_refusals_of_interrupts(kernel: FakeKernel) -> None:
    """The kernel's errno reaches the client; switching off what is off is no error, as a client may expect."""
    async with session(kernel) as client:
        fds = eventfds(2)
        for index in IrqIndex:
            await answer(client.set_irqs(irq_request(index, DISABLE), []))
        assert [] == kernel.device.irq_calls
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 0, 1), copies(fds[0])))
        with pytest.raises(CommandError, match="another kind of interrupt") as refused:
            await answer(client.set_irqs(irq_request(0, ASSIGN, 0, 1), copies(fds[1])))
        assert errno.EINVAL == refused.value.errno
        with pytest.raises(CommandError, match="cannot mask") as refused:
            await answer(client.set_irqs(irq_request(MSIX_INDEX, MASK, 0, 1), []))
        assert errno.ENOTTY == refused.value.errno
        no_eventfd = os.memfd_create("x")
        with pytest.raises(CommandError) as refused:
            await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 0, 1), given(no_eventfd)))
        assert errno.EINVAL == refused.value.errno
        for fd in fds:
            os.close(fd)


async def test_the_kernels_request_for_the_device_is_passed_on(kernel: FakeKernel) -> None:
    """REQ, by which the kernel asks for the device back, is an eventfd of the client like any other."""
    async with session(kernel) as client:
        fd = eventfds(1)[0]
        await answer(client.set_irqs(irq_request(IrqIndex.REQ, ASSIGN, 0, 1), copies(fd)))
        kernel.device.fire(IrqIndex.REQ, 0)
        assert 1 == os.eventfd_read(fd)
        await answer(client.set_irqs(irq_request(IrqIndex.REQ, ASSIGN, 0, 1), []))
        await answer(client.set_irqs(irq_request(IrqIndex.REQ, DISABLE), []))
        os.close(fd)


# The end


@pytest.mark.parametrize("has_reset", [True, False])
async def test_nothing_is_left_when_the_client_goes(kernel: FakeKernel, memory: int, has_reset: bool) -> None:
    """Interrupts off, bus master off, reset, memory unmapped, and no descriptor of ours open."""
    kernel.device.has_reset = has_reset
    before = set(os.listdir("/proc/self/fd"))
    async with session(kernel) as client:
        await answer(client.region_write(CONFIG, 4, b"\x06\x00", posted=False))
        await answer(client.dma_map(map_request(0, MIB), copies(memory)))
        fd = eventfds(1)[0]
        await answer(client.set_irqs(irq_request(MSIX_INDEX, ASSIGN, 0, 1), given(fd)))
    assert {} == kernel.device.enabled
    assert 0 == kernel.device.command & 4
    assert has_reset == (kernel.device.resets > 0)
    assert [] == kernel.iommu.ranges
    assert {} == kernel.nodes
    assert {} == kernel.views
    assert before == set(os.listdir("/proc/self/fd"))


async def test_a_client_that_goes_during_a_map(kernel: FakeKernel, memory: int) -> None:
    """Its successor waits for the end of that map, and then has the device to itself."""
    from fakevfio.bed import NoMessages

    async with running(kernel) as backend:
        first = await backend.open(NoMessages())
        kernel.gate.clear()
        with trio.move_on_after(0.02):
            await answer(first.dma_map(map_request(0, MIB), copies(memory)))
        with trio.move_on_after(0.02) as scope:
            await first.close()
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:

            async def successor() -> None:
                second = await backend.open(NoMessages())
                assert [] == kernel.iommu.ranges
                await second.close()

            nursery.start_soon(successor)
            await trio.sleep(0.02)
            kernel.gate.set()
    assert {} == kernel.nodes
