"""What stands in the way of a client, by name, on whichever interface of the kernel this run is about."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import trio

from kvfio import bed
from kvfio.bed import BYPASSED, INTERFACE, NVME, SHARED, Daemon, background_client, client, daemon
from kvfio.scenarios import MIB, refusal, verified_io, wait_until
from vfiouser_oob.cli.main import main as command
from vfiouser_oob.client.client import Client
from vfiouser_oob.config.schema import LogLevel, RegionPolicy, VfioInterface
from vfiouser_oob.transport.fds import LentFd
from vfiouser_protocol.constants import RegionIndex
from vfiouser_protocol.errors import ReplyError

F_SEAL_FUTURE_WRITE = 0x10
ENTRY_LIMIT = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
NOIOMMU_MODE = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")


def unavailable(bdf: str, *words: str) -> None:
    """A daemon turns its client away with this reason, and goes on running."""
    with daemon(bdf) as served:
        client(turned_away, served)
        reason = served.status()["unavailable"]
        assert all(word in reason for word in words), reason
        assert "\n" not in reason
        print(reason)


async def turned_away(path: Path) -> None:
    """A client that must not be served."""
    try:
        async with Client.connect(path):
            raise AssertionError("the client was served")
    except ReplyError as error:
        assert errno.ENODEV == error.errno, error


def run_command(*arguments: str) -> tuple[int, str]:
    """Run our command in a process of its own; returns its status and what it printed of errors.

    The process is a fork of this one, since a new Python takes ten seconds here.
    """
    with tempfile.TemporaryFile() as errors:
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            status = command(arguments)
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        return os.waitstatus_to_exitcode(status), errors.read().decode()


def no_iommu() -> None:
    """A machine without an IOMMU: the daemon and `bind` say so in one line; its driver keeps it."""
    assert "nvme" == bed.driver_of(NVME)
    unprotected(NVME)


def bypassed() -> None:
    """A function that the machine's IOMMU is not in front of: the same."""
    unprotected(BYPASSED)


def unprotected(bdf: str) -> None:
    """A function that cannot be had is refused in one line, and keeps its driver."""
    driver = bed.driver_of(bdf)
    unavailable(bdf, f"{bdf} has no IOMMU group", "intel_iommu=on")
    status, error = run_command("bind", bdf)
    assert 1 == status, status
    assert f"{bdf} has no IOMMU group" in error, error
    assert 1 == error.count("\n"), error
    assert driver == bed.driver_of(bdf), "the driver lost a function that vfio-pci cannot have"


def noiommu_mode() -> None:
    """VFIO's mode without an IOMMU, where the kernel has it: the function is bound, and refused all the same."""
    NOIOMMU_MODE.write_text("Y")
    function = bed.SYSFS / "bus/pci/devices" / NVME
    try:
        (function / "driver_override").write_text("vfio-pci")
        (function / "driver/unbind").write_text(NVME)
        (bed.SYSFS / "bus/pci/drivers_probe").write_text(NVME)
        assert "vfio-pci" == bed.driver_of(NVME)
        unavailable(NVME, "bound without an IOMMU", "enable_unsafe_noiommu_mode")
        status, error = run_command("bind", NVME)
        assert (1, True) == (status, "bound without an IOMMU" in error), error
        bed.unbind(NVME)
        assert "nvme" == bed.driver_of(NVME)
    finally:
        NOIOMMU_MODE.write_text("N")


def iova_windows() -> None:
    """Addresses that the IOMMU keeps for interrupts, or does not reach, are refused with those that it takes."""

    async def work(path: Path) -> None:
        fd = os.memfd_create("client")
        os.ftruncate(fd, 4 * MIB)
        async with Client.connect(path) as connected:
            assert 65535 == connected.capabilities.max_dma_maps
            for address, size in ((0xFEE0_0000, 4096), (0xFEDF_F000, 8192), (1 << 48, 4096), ((1 << 48) - 4096, 8192)):
                refused = await refusal(lambda a=address, s=size: connected.dma_map(a, s, fd=LentFd(fd)))  # type: ignore[misc]
                assert errno.EINVAL == refused, f"{address:#x}+{size:#x}: {refused}"
            for address in (0xFEDF_F000, 0xFEF0_0000, (1 << 48) - 4096):
                await connected.dma_map(address, 4096, fd=LentFd(fd))

    with daemon(NVME) as served:
        client(work, served)
        error = served.status()["last_error"]
        assert "is not inside what the IOMMU can address (0x0-0xfedfffff, 0xfef00000-0xffffffffffff)" in error, error
        print(error)


def entry_limit() -> None:
    """A container takes as many ranges as its driver says: the client is told the number, and one more is ENOSPC."""
    assert INTERFACE is VfioInterface.GROUP
    limit = ENTRY_LIMIT.read_text()
    assert "65535" == limit.strip()
    ENTRY_LIMIT.write_text("8")

    async def work(path: Path) -> None:
        fd = os.memfd_create("client")
        os.ftruncate(fd, MIB)
        async with Client.connect(path) as connected:
            assert 8 == connected.capabilities.max_dma_maps
            for index in range(8):
                await connected.dma_map(index * 8192, 4096, fd=LentFd(fd))
            assert errno.ENOSPC == await refusal(lambda: connected.dma_map(MIB, 4096, fd=LentFd(fd)))
            await connected.dma_unmap(0, 4096)
            await connected.dma_map(MIB, 4096, fd=LentFd(fd))

    try:
        with daemon(NVME) as served:
            client(work, served)
            print(served.status()["last_error"])
    finally:
        ENTRY_LIMIT.write_text(limit)


def read_only_files() -> None:
    """What a client may not write, its device may not write either: a descriptor for reading, and sealed memory."""

    async def work(path: Path) -> None:
        fd = os.memfd_create("client", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, MIB)
        readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        writable = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
        async with Client.connect(path) as connected:
            assert errno.EACCES == await refusal(lambda: connected.dma_map(0, MIB, fd=LentFd(readable)))
            assert errno.EACCES == await refusal(lambda: connected.dma_map(0, MIB, fd=LentFd(readable), flags=2))
            assert errno.EACCES == await refusal(lambda: connected.dma_map(0, MIB, fd=LentFd(writable), flags=1))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
            assert errno.EPERM == await refusal(lambda: connected.dma_map(0, MIB, fd=LentFd(fd)))
            await connected.dma_map(0, MIB, fd=LentFd(fd), flags=1)
            await connected.dma_map(MIB, MIB, fd=LentFd(readable), flags=1)

    with daemon(NVME) as served:
        client(work, served)


def group_in_use() -> None:
    """Two functions of one group: while one of them has a client, the other one's is refused; then it is served."""
    held = bed.RUN / "held"

    async def hold(path: Path) -> None:
        async with Client.connect(path):
            held.touch()
            with trio.fail_after(30):
                while held.exists():
                    await trio.sleep(0.02)

    async def afterwards(path: Path) -> None:
        await free_again(second)
        await verified_io(path)

    bed.bind(*SHARED)
    with daemon(SHARED[0]) as first, daemon(SHARED[1], name="f1") as second:
        with background_client(hold, first, uid=0):
            wait_until(held.exists)
            client(turned_away, second)
            reason = second.status()["unavailable"]
            assert "is in use" in reason, reason
            assert "another function of its IOMMU group" in reason, reason
            print(reason)
            held.unlink()
        client(afterwards, second, uid=0)
    bed.unbind(*SHARED)


def kept_mapping() -> None:
    """A client that keeps nothing but a mapped BAR keeps the next one out as well, until it unmaps it."""
    with daemon(NVME) as served:

        async def work(path: Path) -> None:
            async with Client.connect(path) as connected:
                region = await connected.get_region_info(0)
                assert region.fd is not None
                kept = _map(region.fd.fileno(), region.description.size, region.description.offset)
                region.close()
            await turned_away(path)
            assert "is in use" in served.status()["unavailable"]
            ctypes.CDLL(None).munmap(ctypes.c_void_p(kept), ctypes.c_size_t(region.description.size))
            await free_again(served)
            async with Client.connect(path) as connected:
                await connected.get_info()

        client(work, served, uid=0)


def _map(fd: int, size: int, offset: int) -> int:
    """Map without a copy of the descriptor, which `mmap.mmap` keeps."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.PROT_READ | mmap.PROT_WRITE
    address = libc.mmap(None, ctypes.c_size_t(size), flags, mmap.MAP_SHARED, fd, ctypes.c_long(offset))
    assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    return int(address)


async def free_again(served: Daemon) -> None:
    """Wait until the daemon has noticed by itself that it can have the device."""
    with trio.fail_after(10):
        while served.status()["unavailable"] is not None:
            await trio.sleep(0.05)


def dma_buf() -> None:
    """A kernel that makes dma-bufs but maps none, or makes none: `auto` hands the device out, `dmabuf` nothing."""

    async def work(path: Path, *, mapped: bool) -> None:
        async with Client.connect(path) as connected:
            region = await connected.get_region_info(0)
            assert mapped == (region.fd is not None)
            if region.fd is not None:
                assert "vfio" in os.readlink(f"/proc/self/fd/{region.fd.fileno()}")
            await connected.region_write(RegionIndex.CONFIG, 4, b"\x06\x00")
            assert await connected.region_read(0, 0, 4)
            region.close()

    for policy, line in (
        (RegionPolicy.AUTO, "s no dma-buf of a region"),  # makes none, before Linux 6.19, or maps none
        (RegionPolicy.DMABUF, "this kernel cannot map a dma-buf of a region; every access is a message"),
    ):
        with daemon(NVME, policy=policy, logged=LogLevel.DEBUG) as served:
            client(lambda path, p=policy: work(path, mapped=p is RegionPolicy.AUTO), served)  # type: ignore[misc]
            log = served.log.read_text()
            assert line in log, log
            print(next(entry for entry in log.splitlines() if line in entry))


OBSTACLES: Mapping[str, Callable[[], None]] = {
    scenario.__name__: scenario
    for scenario in (
        no_iommu,
        bypassed,
        noiommu_mode,
        group_in_use,
        iova_windows,
        entry_limit,
        read_only_files,
        kept_mapping,
        dma_buf,
    )
}
