"""What is proven in the guest, by name."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from kvfio import bed
from kvfio.admin import AdminQueue
from kvfio.bed import IGB, INTERFACE, NOBODY, NVME, SHARED, background_client, client, daemon
from kvfio.device import export_dma_buf
from kvfio.nested import stock_linux, stock_qemu
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.client.mapping import MappedRegion
from vfiouser_oob.config.schema import RegionPolicy, VfioInterface
from vfiouser_oob.lab.nvme.driver import NvmeDriver
from vfiouser_oob.lab.nvme.layout import CC, CSTS
from vfiouser_oob.transport.fds import LentFd
from vfiouser_protocol.constants import IrqIndex, IrqSetFlags, RegionIndex
from vfiouser_protocol.errors import ReplyError

MIB = 1 << 20
IOVA = 0x4000_0000
MODEL = b"QEMU NVMe Ctrl"
MASK = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_MASK
UNMASK = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK
UNMASK_EVENTFD = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_UNMASK
ACCESS_COMMANDS = ("REGION_READ", "REGION_WRITE", "REGION_WRITE_MULTI")


def eventfd() -> int:
    """A new eventfd."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


async def fired(fd: int, seconds: float = 5.0) -> int:
    """Wait for an eventfd and return its count; 0 if it stays silent."""
    with trio.move_on_after(seconds):
        await trio.lowlevel.wait_readable(fd)
        return os.eventfd_read(fd)
    return 0


@asynccontextmanager
async def admin_queue(path: Path) -> AsyncIterator[AdminQueue]:
    """A client with memory mapped and BAR 0 open; the controller is not enabled yet."""
    async with Client.connect(path) as connected:
        with ClientMemory(2 * MIB, IOVA) as memory:
            await memory.map(connected)
            with await MappedRegion.open(connected, 0) as bar:
                yield AdminQueue(connected, memory, bar)


async def refusal(call: Callable[[], object]) -> int:
    """Return the errno that a call is refused with."""
    try:
        await call()  # type: ignore[misc]
    except ReplyError as error:
        return error.errno
    raise AssertionError("it was not refused")


# The data path


async def verified_io(path: Path) -> None:
    """Identify, write and read back through mapped BAR, DMA and MSI-X eventfds, as a driver does."""
    async with Client.connect(path) as connected:
        with ClientMemory(8 * MIB, IOVA) as memory:
            await memory.map(connected)
            async with NvmeDriver.open(connected, memory) as driver:
                assert MODEL.decode() in driver.controller.model, driver.controller
                assert 0x4000 == driver.bar.mapped_bytes
                data = bytes(i * 7 % 251 for i in range(256 * 1024))
                await driver.write(16, data)
                assert data == await driver.read(16, len(data) // driver.namespace.block_size)
                assert min(driver.interrupts) > 0, driver.interrupts
                assert 0 == driver.bar.trapped
                print(f"interrupts={driver.interrupts} direct={driver.bar.direct} uid={os.getuid()}")


def data_path() -> None:
    """The whole way, with a client of another user; no register access of the BAR is a message."""
    with daemon(NVME) as served:
        client(verified_io, served)
        wait_until(lambda: served.status()["client"] is None)
        assert 0 == bed.command_register(NVME) & 4, "bus mastering is still on"
        client(verified_io, served)


def trap_policy() -> None:
    """With `trap` the client gets no descriptor, and all works by messages."""

    async def work(path: Path) -> None:
        async with admin_queue(path) as queue:
            assert 0 == queue.bar.mapped_bytes
            await queue.enable()
            assert MODEL in await queue.identify()
            assert queue.bar.trapped > 0

    with daemon(NVME, policy=RegionPolicy.TRAP) as served:
        client(work, served)


def unprivileged_daemon() -> None:
    """A daemon without privilege serves a function whose node it owns, within its limit of locked memory."""
    with bed.given_away(NVME), daemon(NVME, uid=NOBODY, memlock=64 * MIB) as served:
        client(verified_io, served, uid=NOBODY - 1)


# Interrupts


async def intx_work(path: Path) -> None:
    """INTx: masked by the kernel when it fires, unmasked by message and by eventfd, masked by the client."""
    async with admin_queue(path) as queue:
        line, resample = eventfd(), eventfd()
        await queue.enable(intx=True)
        await queue.client.set_eventfds(IrqIndex.INTX, [LentFd(line)])
        await queue.submit()
        assert 1 == await fired(line)
        await queue.submit()  # the line is still asserted, and masked
        assert 0 == await fired(line, 0.3)
        await queue.client.set_irqs(IrqIndex.INTX, UNMASK, count=1)
        assert 1 == await fired(line), "an asserted line fires again when it is unmasked"
        for _ in range(2):
            assert MODEL in await queue.reap()
        await queue.client.set_irqs(IrqIndex.INTX, UNMASK, count=1)
        await queue.client.set_irqs(IrqIndex.INTX, MASK, count=1)
        assert 0 == await fired(line, 0.1)
        await queue.submit()
        assert 0 == await fired(line, 0.3)
        await queue.client.set_irqs(IrqIndex.INTX, UNMASK_EVENTFD, fds=[LentFd(resample)])
        os.eventfd_write(resample, 1)
        assert 1 == await fired(line), "the kernel waits for the resample eventfd itself"
        await queue.reap()
        await queue.client.disable_irqs(IrqIndex.INTX)
        await queue.client.disable_irqs(IrqIndex.INTX)


def intx() -> None:
    """INTx with all that belongs to it."""
    with daemon(NVME) as served:
        client(intx_work, served)


async def msix_work(path: Path) -> None:
    """Vectors one by one, all 65 split over messages, one replaced, one taken away, and the self test."""
    async with admin_queue(path) as queue:
        fds = [eventfd() for _ in range(65)]
        info = await queue.client.get_irq_info(IrqIndex.MSIX)
        await queue.client.set_eventfds(IrqIndex.MSIX, [LentFd(fd) for fd in fds[:1]])
        await queue.enable()
        await queue.identify()
        assert 1 == await fired(fds[0])
        await queue.client.set_eventfds(IrqIndex.MSIX, [LentFd(fd) for fd in fds[5:6]], 5)
        assert errno.EINVAL == await refusal(
            lambda: queue.client.set_eventfds(IrqIndex.INTX, [LentFd(fd) for fd in fds[1:2]])
        )
        await queue.client.disable_irqs(IrqIndex.MSIX)
        await queue.client.set_eventfds(IrqIndex.MSIX, [LentFd(fd) for fd in fds[: info.count]])
        loop_back = IrqSetFlags.DATA_BOOL | IrqSetFlags.ACTION_TRIGGER
        await queue.client.set_irqs(IrqIndex.MSIX, loop_back, 20, data=b"\x01\x00\x01")
        assert [1, 0, 1] == [await fired(fds[vector], 0.1) for vector in (20, 21, 22)]
        await queue.client.set_eventfds(IrqIndex.MSIX, [LentFd(fd) for fd in fds[64:]], 0)
        await queue.identify()
        assert 1 == await fired(fds[64])
        assert errno.ENOTTY == await refusal(lambda: queue.client.set_irqs(IrqIndex.MSIX, MASK, count=1))
        pipe = os.pipe()
        assert errno.EINVAL == await refusal(
            lambda: queue.client.set_eventfds(IrqIndex.MSIX, [LentFd(fd) for fd in pipe[1:]])
        )
        print(f"vectors={info.count} flags={info.flags}")


def msix() -> None:
    """MSI-X, as far as this kernel has it."""
    with daemon(NVME) as served:
        client(msix_work, served)


# Resets


async def resets_work(path: Path) -> None:
    """After DEVICE_RESET and after an FLR by config space the controller is off, and can be used again."""
    async with admin_queue(path) as queue:
        await queue.enable()
        await queue.identify()
        await queue.client.reset()
        assert 0 == int.from_bytes(await queue.client.region_read(RegionIndex.CONFIG, 4, 2), "little") & 4
        await queue.enable()
        assert MODEL in await queue.identify()
        config = await queue.client.region_read(RegionIndex.CONFIG, 0, 256)
        offset = config[0x34]
        while config[offset] != 0x10:
            offset = config[offset + 1]
        control = int.from_bytes(config[offset + 8 : offset + 10], "little")
        await queue.client.region_write(RegionIndex.CONFIG, offset + 8, (control | 0x8000).to_bytes(2, "little"))
        await queue.client.region_write(RegionIndex.CONFIG, 4, b"\x06\x04")
        assert 0 == await queue.bar.read(CC, 4), "the function-level reset did not reset"
        await queue.enable()
        assert MODEL in await queue.identify()


def resets() -> None:
    """DEVICE_RESET and function-level reset."""
    with daemon(NVME) as served:
        client(resets_work, served)


# Memory


async def unmap_work(path: Path) -> None:
    """Memory that is taken back while the controller uses it is not touched any more; a reset brings it back."""
    async with admin_queue(path) as queue:
        await queue.enable()
        await queue.identify()
        for _ in range(20):
            await queue.client.dma_map(0x1_0000_0000, MIB, fd=queue.memory)
            await queue.client.dma_unmap(0x1_0000_0000, MIB)
        await queue.memory.unmap(queue.client)
        with queue.memory.view(queue.data, 4096) as view:
            view[:] = bytes(4096)
        await queue.submit()
        try:
            await queue.reap(seconds=0.5)
        except trio.TooSlowError:
            pass
        else:
            raise AssertionError("a command completed in memory that was taken back")
        with queue.memory.view(queue.data, 4096) as view:
            assert bytes(4096) == bytes(view), "memory was written that had been taken back"
        assert await queue.bar.read(CSTS, 4) & 2, "the controller did not notice"
        await queue.client.reset()
        await queue.memory.map(queue.client)
        await queue.enable()
        assert MODEL in await queue.identify()


def unmap_under_io() -> None:
    """Mapping and unmapping while the controller is at work."""
    with daemon(NVME) as served:
        client(unmap_work, served)


async def peer_to_peer_work(path: Path) -> None:
    """A BAR is mapped for DMA by its descriptor, like memory, and taken back; an iommufd does so by a dma-buf only."""
    async with Client.connect(path) as connected:
        await connected.region_write(RegionIndex.CONFIG, 4, b"\x06\x00")
        region = await connected.get_region_info(0)
        assert region.fd is not None
        device, offset = region.fd.fileno(), region.description.offset
        if INTERFACE is VfioInterface.CDEV:
            refused = await refusal(lambda: connected.dma_map(0x2_0000_0000, 0x4000, fd=LentFd(device), offset=offset))
            assert errno.EFAULT == refused, refused
            device, offset = export_dma_buf(device, 0, 0x4000), 0
        await connected.dma_map(0x2_0000_0000, 0x4000, fd=LentFd(device), offset=offset)
        region.close()
        await connected.dma_unmap(0x2_0000_0000, 0x4000)


def peer_to_peer() -> None:
    """A BAR as the target of DMA."""
    with daemon(NVME) as served:
        client(peer_to_peer_work, served)


async def map_errors_work(path: Path) -> None:
    """Each mapping that cannot be, with its errno; a range without file is accepted."""
    fd = os.memfd_create("client")
    os.ftruncate(fd, 4 * MIB)
    readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    short = os.memfd_create("short")
    async with Client.connect(path) as connected:
        for address, size, source, number in (
            (0x800, MIB, fd, errno.EINVAL),
            (0, 100, fd, errno.EINVAL),
            (0xFEE0_0000, 4096, fd, errno.EINVAL),
            (1 << 50, 4096, fd, errno.EINVAL),
            (0, MIB, short, errno.EFAULT),
            (0, MIB, readable, errno.EACCES),
            (0, MIB, eventfd(), errno.ENODEV),
        ):
            refused = await refusal(lambda a=address, s=size, f=source: connected.dma_map(a, s, fd=LentFd(f)))  # type: ignore[misc]
            assert number == refused, f"{address:#x}+{size:#x}: errno {refused}, not {number}"
        await connected.dma_map(0, MIB, fd=LentFd(readable), flags=1)
        await connected.dma_map(MIB, MIB, fd=LentFd(fd), offset=MIB)
        assert errno.EEXIST == await refusal(lambda: connected.dma_map(MIB, 4096, fd=LentFd(fd)))
        await connected.dma_map(0xE000_0000, 0x2000)
        await connected.dma_unmap(0xE000_0000, 0x2000)
        assert errno.ENOENT == await refusal(lambda: connected.dma_unmap(MIB, 4096))
        await connected.dma_unmap(MIB, MIB)


def map_errors() -> None:
    """What the IOMMU does not map."""
    with daemon(NVME) as served:
        client(map_errors_work, served)


def locked_memory_limit() -> None:
    """Too small a limit is ENOMEM for the client, and a line that names the limit for the administrator."""

    async def work(path: Path) -> None:
        fd = os.memfd_create("client")
        os.ftruncate(fd, 16 * MIB)
        async with Client.connect(path) as connected:
            await connected.dma_map(0, 4 * MIB, fd=LentFd(fd))
            assert errno.ENOMEM == await refusal(lambda: connected.dma_map(16 * MIB, 8 * MIB, fd=LentFd(fd)))
            await connected.dma_map(16 * MIB, 2 * MIB, fd=LentFd(fd))

    with bed.given_away(NVME), daemon(NVME, uid=NOBODY, memlock=8 * MIB) as served:
        client(work, served)
        error = served.status()["last_error"]
        assert f"the limit of locked memory is {8 * MIB} bytes" in error, error
        print(error)


# Who has the device


def kept_descriptor() -> None:
    """A client that keeps the device keeps the next one out, until it lets go; the daemon notices by itself."""
    with daemon(NVME) as served:

        async def work(path: Path) -> None:
            async with Client.connect(path) as connected:
                region = await connected.get_region_info(0)
            assert region.fd is not None
            try:
                async with Client.connect(path):
                    raise AssertionError("the next client was served while the device is held")
            except ReplyError as error:
                assert errno.ENODEV == error.errno
            status = served.status()
            assert "is in use" in status["unavailable"], status
            region.close()
            with trio.fail_after(10):
                while served.status()["unavailable"] is not None:
                    await trio.sleep(0.05)
            async with Client.connect(path) as connected:
                await connected.get_info()

        client(work, served, uid=0)


def second_daemon() -> None:
    """A function that another daemon's client uses is refused, with what is in use in the reason."""

    async def hold(path: Path) -> None:
        async with Client.connect(path):
            (bed.RUN / "held").touch()
            with trio.fail_after(30):
                while (bed.RUN / "held").exists():
                    await trio.sleep(0.02)

    with daemon(NVME) as first, background_client(hold, first, uid=0):
        wait_until((bed.RUN / "held").exists)
        with daemon(NVME, name="f1") as second:
            client(_turned_away, second)
            what = NVME if INTERFACE is VfioInterface.CDEV else bed.group_node(NVME)
            assert f"{what} is in use: another process" in second.status()["unavailable"]
            print(second.status()["unavailable"])
        (bed.RUN / "held").unlink()


def killed_daemon() -> None:
    """The device goes on serving its client when the daemon is killed; a successor waits until that client ends."""

    async def work(path: Path) -> None:
        async with admin_queue(path) as queue:
            fd = eventfd()
            await queue.client.set_eventfds(IrqIndex.MSIX, [LentFd(fd)])
            await queue.enable()
            await queue.identify()
            assert 1 == await fired(fd)
            (bed.RUN / "ready").touch()
            await queue.client.wait_gone()
            assert MODEL in await queue.identify()
            assert 1 == await fired(fd)
            (bed.RUN / "survived").touch()
            with trio.fail_after(30):
                while (bed.RUN / "survived").exists():
                    await trio.sleep(0.02)

    with daemon(NVME) as first, background_client(work, first, uid=0):
        wait_until((bed.RUN / "ready").exists)
        (bed.RUN / "ready").unlink()
        first.kill()
        wait_until((bed.RUN / "survived").exists)
        with daemon(NVME, name="f1") as second:
            client(_turned_away, second)
            (bed.RUN / "survived").unlink()
            wait_until(lambda: second.status()["unavailable"] is None)
            client(verified_io, second)


async def _turned_away(path: Path) -> None:
    try:
        async with Client.connect(path):
            raise AssertionError("the client was served")
    except ReplyError as error:
        assert errno.ENODEV == error.errno, error


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Look until something is so."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)


def _refused(bdf: str, words: str, *, uid: int = 0) -> None:
    with daemon(bdf, uid=uid) as served:
        client(_turned_away, served)
        reason = served.status()["unavailable"]
        assert words in reason, reason
        print(reason)


def not_bound() -> None:
    """A function that the host's driver has; then it is bound and given back by our commands."""
    assert "nvme" == bed.driver_of(SHARED[0])
    _refused(SHARED[0], f"bound to the driver nvme, not to vfio-pci: bind it with `vfiouser-oob bind {SHARED[0]}`")
    bed.bind(SHARED[0])
    assert "vfio-pci" == bed.driver_of(SHARED[0])
    bed.unbind(SHARED[0])
    assert "nvme" == bed.driver_of(SHARED[0])


def not_viable() -> None:
    """A function whose sibling in the IOMMU group is the host's; binding that one as well mends it."""
    bed.bind(SHARED[0])
    _refused(SHARED[0], f"is not viable: these members are bound to other drivers: {SHARED[1]} (nvme)")
    bed.bind(SHARED[1])
    with daemon(SHARED[0]) as served:
        client(verified_io, served)
    bed.unbind(*SHARED)


def no_permission() -> None:
    """A daemon without privilege, and a node that is root's."""
    node = bed.IOMMU_NODE if INTERFACE is VfioInterface.CDEV else "/dev/vfio/"
    _refused(NVME, f"no permission to open {node}", uid=NOBODY)


def asked_back() -> None:
    """When the administrator unbinds a function that is in use, its client is asked for it, and lets go."""

    async def work(path: Path) -> None:
        async with Client.connect(path) as connected:
            request = eventfd()
            await connected.set_eventfds(IrqIndex.REQ, [LentFd(request)])
            (bed.RUN / "used").touch()
            assert await fired(request, 20) >= 1, "nobody asked"

    with daemon(NVME) as served, background_client(work, served):
        wait_until((bed.RUN / "used").exists)
        (bed.RUN / "used").unlink()
        bed.unbind(NVME)  # the kernel waits until the client has gone
        assert "nvme" == bed.driver_of(NVME)
    bed.bind(NVME)


# A virtual function


async def igb_work(path: Path) -> None:
    """Regions, registers, interrupts and reset of a VF that has no INTx."""
    async with Client.connect(path) as connected:
        assert 0 == (await connected.get_irq_info(IrqIndex.INTX)).count
        vectors = (await connected.get_irq_info(IrqIndex.MSIX)).count
        assert vectors >= 3
        sizes = []
        for index in range(6):
            region = await connected.get_region_info(index)
            sizes.append(region.description.size)
            region.close()
        await connected.region_write(RegionIndex.CONFIG, 4, b"\x06\x00")
        identity = struct.unpack("<HH", await connected.region_read(RegionIndex.CONFIG, 0, 4))
        assert (0x8086, 0x10CA) == identity, [hex(number) for number in identity]
        with await MappedRegion.open(connected, 0) as bar:
            assert bar.mapped_bytes > 0
            mapped = await bar.read(8, 4)
            assert mapped == int.from_bytes(await connected.region_read(0, 8, 4), "little")
            assert mapped not in {0, 0xFFFF_FFFF}
        fds = [eventfd() for _ in range(vectors)]
        await connected.set_eventfds(IrqIndex.MSIX, [LentFd(fd) for fd in fds])
        loop_back = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
        await connected.set_irqs(IrqIndex.MSIX, loop_back, count=vectors)
        assert [1] * vectors == [await fired(fd) for fd in fds]
        await connected.disable_irqs(IrqIndex.MSIX)
        await connected.reset()
        print(f"sizes={sizes} vectors={vectors} status={mapped:#x}")


def igb_vf() -> None:
    """A virtual function of an emulated network card, its physical function kept by pci-pf-stub."""
    physical = bed.SYSFS / "bus/pci/devices" / IGB
    (physical / "driver_override").write_text("pci-pf-stub")
    (bed.SYSFS / "bus/pci/drivers_probe").write_text(IGB)
    (physical / "sriov_numvfs").write_text("1")
    virtual = os.path.basename(os.readlink(physical / "virtfn0"))
    bed.bind(virtual)
    with daemon(virtual) as served:
        client(igb_work, served)
    bed.unbind(virtual)
    (physical / "sriov_numvfs").write_text("0")


# Stock QEMU


def qemu() -> None:
    """Stock QEMU's client drives the function under qtest; its accesses of the BAR are no messages."""
    with daemon(NVME) as served:

        def accesses() -> int:
            messages = served.status()["messages"]
            return sum(messages.get(name, 0) for name in ACCESS_COMMANDS)

        client(lambda path: stock_qemu(path, accesses), served, uid=0)
        print(f"messages={served.status()['messages']}")


def linux() -> None:
    """Linux in nested QEMU uses the function, with verified data."""
    with daemon(NVME, reply_budget_s=100.0) as served:

        def accesses() -> int:
            messages = served.status()["messages"]
            return sum(messages.get(name, 0) for name in ACCESS_COMMANDS)

        client(lambda path: stock_linux(path, accesses), served, uid=0)


def bind_nvme() -> None:
    """Bind the function that most scenarios are about, by our command."""
    assert "nvme" == bed.driver_of(NVME)
    bed.bind(NVME)
    assert "vfio-pci" == bed.driver_of(NVME)


SCENARIOS: Mapping[str, Callable[[], None]] = {
    scenario.__name__: scenario
    for scenario in (
        bind_nvme,
        data_path,
        trap_policy,
        unprivileged_daemon,
        intx,
        msix,
        resets,
        unmap_under_io,
        map_errors,
        peer_to_peer,
        locked_memory_limit,
        kept_descriptor,
        second_daemon,
        killed_daemon,
        asked_back,
        not_bound,
        not_viable,
        no_permission,
        igb_vf,
        qemu,
        linux,
    )
}
