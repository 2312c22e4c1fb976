"""What is particular to device nodes and iommufd: the kernel's rules that keep clients apart there, and ours."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from kvfio import bed, mdev
from kvfio.bed import NOBODY, NVME, background_client, client, daemon
from kvfio.device import attach, detach
from kvfio.obstacles import free_again, turned_away
from kvfio.scenarios import IOVA, MIB, MODEL, admin_queue, verified_io, wait_until
from vfiouser_oob.client.client import Client
from vfiouser_oob.config.schema import VfioInterface
from vfiouser_oob.devices.kernel_vfio import uapi
from vfiouser_oob.devices.kernel_vfio.iommufd import IommufdSpace
from vfiouser_oob.devices.kernel_vfio.kernel import LinuxKernel
from vfiouser_oob.devices.kernel_vfio.openers import OpenDevice, choose_opener
from vfiouser_oob.transport.fds import LentFd

MANY = 66_000


def _opened(kernel: LinuxKernel) -> tuple[OpenDevice, IommufdSpace]:
    opened = choose_opener(kernel, NVME, VfioInterface.CDEV).open()
    assert isinstance(opened.space, IommufdSpace)
    return opened, opened.space


def _errno(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


def _bind(node: int, iommufd: int) -> None:
    request = bytearray(uapi.BIND_IOMMUFD.pack(uapi.BIND_IOMMUFD.size, 0, iommufd, 0))
    fcntl.ioctl(node, uapi.VFIO_DEVICE_BIND_IOMMUFD, request, True)


def node_rules() -> None:
    """A node is opened by many and bound by one, until that one's file is closed; the group's node excludes it."""
    path, flags = bed.own_node(NVME), os.O_RDWR
    iommufd, first, second = os.open(bed.IOMMU_NODE, flags), os.open(path, flags), os.open(path, flags)
    information = bytearray(uapi.DEVICE_INFO.size)
    assert errno.EINVAL == _errno(lambda: fcntl.ioctl(first, uapi.VFIO_DEVICE_GET_INFO, information))
    _bind(first, iommufd)
    assert errno.EINVAL == _errno(lambda: _bind(second, iommufd)), "bound twice by two files"
    assert errno.EINVAL == _errno(lambda: _bind(first, iommufd)), "bound twice by one file"
    assert errno.EBUSY == _errno(lambda: os.open(bed.group_node(NVME), flags)), "the group's node while it is bound"
    kept = os.dup(first)
    os.close(first)
    os.close(iommufd)
    iommufd = os.open(bed.IOMMU_NODE, flags)
    assert errno.EINVAL == _errno(lambda: _bind(second, iommufd)), "bound while a copy of the descriptor was there"
    os.close(kept)
    group = os.open(bed.group_node(NVME), flags)
    assert errno.EBUSY == _errno(lambda: _bind(second, iommufd)), "bound while the group's node was open"
    os.close(group)
    _bind(second, iommufd)


class WithoutMapFile(LinuxKernel):
    """A kernel before Linux 6.13, which maps memory by address only."""

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """Leave one command out."""
        if request == uapi.IOMMU_IOAS_MAP_FILE:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return super().ioctl(fd, request, argument)


def attached_again() -> None:
    """Whoever has the device can take it from its address space and put it back; the kernel looks up addresses again.

    Of memory that was mapped by address and is not there any more, the kernel says so; had the daemon something else
    there, the device would have that. Our address spaces keep the place.
    """
    memory = os.memfd_create("client")
    os.ftruncate(memory, MIB)
    kernel = WithoutMapFile()
    opened, space = _opened(kernel)
    address = kernel.mmap(memory, MIB, 0, writable=True)
    layout = uapi.IOAS_MAP
    flags = uapi.IOMMU_IOAS_MAP_FIXED_IOVA | uapi.IOMMU_IOAS_MAP_READABLE | uapi.IOMMU_IOAS_MAP_WRITEABLE
    request = bytearray(layout.pack(layout.size, flags, space.ioas, 0, address, MIB, IOVA))
    iommufd = next(fd for fd in _descriptors() if os.readlink(f"/proc/self/fd/{fd}") == str(bed.IOMMU_NODE))
    fcntl.ioctl(iommufd, uapi.IOMMU_IOAS_MAP, request, True)
    kernel.munmap(address, MIB)
    detach(opened.device.fd)
    assert errno.EFAULT == _errno(lambda: attach(opened.device.fd, space.ioas)), "the kernel kept what it had"
    space.unmap_all()
    attach(opened.device.fd, space.ioas)

    for kind, again in (("by address", space), ("by file", None)):
        if again is None:
            opened.close()
            opened, again = _opened(LinuxKernel())
        again.map(memory, 0, IOVA, MIB, read=True, write=True)
        detach(opened.device.fd)
        assert 0 == _errno(lambda o=opened, s=again: attach(o.device.fd, s.ioas)), kind  # type: ignore[misc]
        assert (kind == "by address") == _is_mapped("memfd:client")
        again.unmap_all()
        assert not _is_mapped("memfd:client")
    opened.close()


def _descriptors() -> list[int]:
    return [int(path.name) for path in Path("/proc/self/fd").iterdir() if path.exists()]


def _is_mapped(name: str) -> bool:
    return name in Path("/proc/self/maps").read_text()


def unchecked_access() -> None:
    """The kernel maps a file for writing that may only be read; our address space does not."""
    memory = os.memfd_create("client")
    os.ftruncate(memory, MIB)
    readable = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    opened, space = _opened(LinuxKernel())
    layout = uapi.IOAS_MAP_FILE
    flags = uapi.IOMMU_IOAS_MAP_FIXED_IOVA | uapi.IOMMU_IOAS_MAP_READABLE | uapi.IOMMU_IOAS_MAP_WRITEABLE
    request = bytearray(layout.pack(layout.size, flags, space.ioas, readable, 0, MIB, IOVA))
    iommufd = next(fd for fd in _descriptors() if os.readlink(f"/proc/self/fd/{fd}") == str(bed.IOMMU_NODE))
    print(f"kernel: errno {_errno(lambda: fcntl.ioctl(iommufd, uapi.IOMMU_IOAS_MAP_FILE, request, True))}")
    space.unmap_all()
    refused = _errno(lambda: space.map(readable, 0, IOVA, MIB, read=True, write=True))
    assert errno.EACCES == refused, refused
    space.map(readable, 0, IOVA, MIB, read=True, write=False)
    opened.close()


def rearranging_client() -> None:
    """A client detaches the device it was given and attaches it again: to its own memory, and to nothing else."""

    async def work(path: Path) -> None:
        async with admin_queue(path) as queue:
            region = await queue.client.get_region_info(0)
            assert region.fd is not None
            device = region.fd.fileno()
            await queue.enable()
            await queue.identify()
            detach(device)
            spaces = [number for number in range(64) if 0 == _errno(lambda n=number: attach(device, n))]  # type: ignore[misc]
            assert len(spaces) >= 1, "not even its own"
            await queue.enable()
            assert MODEL in await queue.identify()
            assert errno.EACCES == _errno(lambda: os.open(bed.own_node(NVME), os.O_RDWR))
            assert errno.EACCES == _errno(lambda: os.open(f"/proc/self/fd/{device}", os.O_RDWR)), "opened anew"
            pipe = os.pipe()[0]
            assert errno.EINVAL == _errno(lambda: _bind(device, pipe)), "bound to something else"
            print(f"address spaces within reach: {spaces}")
            region.close()

    with daemon(NVME) as served:
        client(work, served)
        client(verified_io, served)


def accounting() -> None:
    """What is mapped counts as pinned memory of the daemon, not as locked, and no more when it is unmapped."""

    async def work(path: Path) -> None:
        fd = os.memfd_create("client")
        os.ftruncate(fd, 16 * MIB)
        async with Client.connect(path) as connected:
            before = _kib(served.pid, "VmPin")
            await connected.dma_map(0, 16 * MIB, fd=LentFd(fd))
            assert 16 * 1024 == _kib(served.pid, "VmPin") - before
            assert 0 == _kib(served.pid, "VmLck")
            await connected.dma_unmap(0, 16 * MIB)
            assert before == _kib(served.pid, "VmPin")

    with bed.given_away(NVME), daemon(NVME, uid=NOBODY, memlock=64 * MIB) as served:
        client(work, served, uid=0)


def _kib(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(f"no {name} for process {pid}")


def many_maps() -> None:
    """There is no such limit as a container's: 66 000 ranges at once."""
    memory = os.memfd_create("client")
    os.ftruncate(memory, 4096)
    opened, space = _opened(LinuxKernel())
    assert space.max_maps is None
    for index in range(MANY):
        space.map(memory, 0, index * 8192, 4096, read=True, write=True)
    space.unmap_all()
    opened.close()


def chosen_interface() -> None:
    """Left to itself, the daemon takes the function's own node if it may open that and /dev/iommu, else the group's."""
    for nodes, expected in (
        ((bed.own_node(NVME), bed.group_node(NVME)), "vfio-device"),
        ((bed.own_node(NVME), bed.group_node(NVME), bed.IOMMU_NODE), "/dev/vfio/devices/"),
    ):

        async def work(path: Path, kind: str = expected) -> None:
            async with Client.connect(path) as connected:
                region = await connected.get_region_info(0)
                assert region.fd is not None
                assert kind in os.readlink(f"/proc/self/fd/{region.fd.fileno()}"), kind
                region.close()

        for node in nodes:
            os.chown(node, NOBODY, NOBODY)
        with daemon(NVME, uid=NOBODY, interface=VfioInterface.AUTO) as served:
            client(work, served)
        for node in nodes:
            os.chown(node, 0, 0)


def device_given_away() -> None:
    """A client that has given the device to another process lives on in that, until it lets go."""
    keeper_has_it, let_go = bed.RUN / "kept", bed.RUN / "let-go"

    async def keep(path: Path) -> None:
        async with Client.connect(path) as connected:
            region = await connected.get_region_info(0)
            assert region.fd is not None
            pid = os.fork()
            if pid == 0:  # this process outlives the client and has nothing of it but the device
                for number in _descriptors():
                    if number > 2 and number != region.fd.fileno():
                        os.close(number)
                keeper_has_it.touch()
                wait_until(let_go.exists)
                os._exit(0)
        os._exit(0)

    with daemon(NVME) as served:
        with background_client(keep, served, uid=0):
            wait_until(keeper_has_it.exists)
        client(turned_away, served)
        assert "is in use" in served.status()["unavailable"]
        let_go.touch()

        async def served_again(path: Path) -> None:
            await free_again(served)
            await verified_io(path)

        client(served_again, served, uid=0)
    keeper_has_it.unlink()
    let_go.unlink()


def make_mtty() -> None:
    """Make the mediated devices that migrations are about, of the driver that is built in."""
    for uuid in (mdev.HERE, mdev.THERE, mdev.SMALL):
        mdev.make(uuid)


CDEV_SCENARIOS: Mapping[str, Callable[[], None]] = {
    scenario.__name__: scenario
    for scenario in (
        node_rules,
        attached_again,
        unchecked_access,
        rearranging_client,
        accounting,
        many_maps,
        chosen_interface,
        device_given_away,
        make_mtty,
    )
}
