"""The kernel around the device: sysfs, nodes, containers, iommufd, and who holds what."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

from fakevfio.device import FakeDevice
from fakevfio.iommu import WINDOWS, FakeIommu, View, fail
from fakevfio.migration import FakeMigration
from vfiouser_oob.devices.kernel_vfio.kernel import Kernel
from vfiouser_oob.transport.fds import HasFileno, OwnedFd

BASE = 0x3B64
IOMMUFD = 0x3B80
BDF = "0000:3b:00.2"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
GROUP = "7"


@dataclass
class Node:
    """An open descriptor: what it is, and what belongs to it."""

    kind: str
    joined: bool = False
    maps: FakeIommu | None = None
    bound: bool = field(default=False)


class FakeKernel(Kernel):
    """A machine with one function in one IOMMU group.

    Args:
        root: where sysfs and the nodes are made.
        iommufd: the function has a node of its own, and there is an iommufd.
        mdev: the function is not a PCI function but a mediated device.

    Attributes:
        device: the function.
        iommu: the address space of the one container or iommufd.
        open_errors: errno that opening a node gives, by file name.
        held: another process holds the device.
        viable: whether the group is.
        set_iommu_errno: why SET_IOMMU fails, if it does.
        unmap_errno: why unmapping from an iommufd fails, if it does.
        bind_errno: why binding to an iommufd fails, if it does.
        migration: what its driver can migrate with, if it can.
        dma_buf: `None`, "export" (cannot be mapped) or "mmap".
        gate: calls that map memory wait for it.
    """

    def __init__(self, root: Path, *, iommufd: bool = False, mdev: bool = False) -> None:
        super().__init__(root / "sys", root / "dev")
        self.name = UUID if mdev else BDF
        self.device = FakeDevice()
        self.iommu = FakeIommu()
        self.iommu.emulated = mdev
        self.open_errors: dict[str, int] = {}
        self.held = False
        self.viable = True
        self.set_iommu_errno: int | None = None
        self.get_device_errno: int | None = None
        self.bind_errno: int | None = None
        self.unmap_errno: int | None = None
        self.dma_buf: str | None = None
        self.map_file = True
        self.migration: FakeMigration | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.mapping = threading.Event()
        self.nodes: dict[int, Node] = {}
        self.views: dict[int, View] = {}
        self._next_address = 0x7000_0000_0000
        if mdev:
            self.add_mdev(UUID, GROUP)
        else:
            self.add_function(BDF, GROUP, "vfio-pci")
        self._make_tree(iommufd)

    # sysfs and /dev

    def _make_tree(self, iommufd: bool) -> None:
        nodes = ["vfio/vfio", f"vfio/{GROUP}"]
        if iommufd:
            nodes += ["iommu", "vfio/devices/vfio0"]
            home = self.mdev(UUID) if self.iommu.emulated else self.function(BDF)
            (home / "vfio-dev" / "vfio0").mkdir(parents=True)
        for name in nodes:
            path = self.dev / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def function(self, bdf: str) -> Path:
        """A function's directory."""
        return self.sysfs / "bus/pci/devices" / bdf

    def mdev(self, uuid: str) -> Path:
        """A mediated device's directory."""
        return self.sysfs / "bus/mdev/devices" / uuid

    def add_mdev(self, uuid: str, group: str) -> None:
        """Make a mediated device."""
        parent = self.sysfs / "class/mdev_bus/mtty/mdev_supported_types/mtty-1"
        parent.mkdir(parents=True, exist_ok=True)
        (parent / "device_api").write_text("vfio-pci\n")
        driver, members = self.sysfs / "bus/mdev/drivers/mtty", self.sysfs / "kernel/iommu_groups" / group
        path = self.mdev(uuid)
        for folder in (driver, members, path):
            folder.mkdir(parents=True, exist_ok=True)
        for name, target in (("mdev_type", parent), ("driver", driver), ("iommu_group", members)):
            (path / name).symlink_to(target)

    def add_function(self, bdf: str, group: str | None, driver: str | None, pci_class: str = "0x010802") -> None:
        """Plug a function in."""
        path = self.function(bdf)
        path.mkdir(parents=True)
        (path / "class").write_text(pci_class + "\n")
        self.set_driver(bdf, driver)
        if group is not None:
            members = self.sysfs / "kernel/iommu_groups" / group / "devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / bdf).symlink_to(path)
            (path / "iommu_group").symlink_to(members.parent)

    def set_driver(self, bdf: str, driver: str | None) -> None:
        """Bind a function to a driver, or to none."""
        link = self.function(bdf) / "driver"
        link.unlink(missing_ok=True)
        if driver is not None:
            target = self.sysfs / "bus/pci/drivers" / driver
            target.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)

    # System calls

    def open(self, path: Path) -> int:
        """Open a node."""
        number = self.open_errors.get(path.name)
        if number is not None:
            raise fail(number)
        if not path.exists():
            raise fail(errno.ENOENT)
        kind = {"vfio": "container", "iommu": "iommufd", GROUP: "group", "vfio0": "cdev"}[path.name]
        if kind == "group" and (self.held or any(node.kind == "group" for node in self.nodes.values())):
            raise fail(errno.EBUSY)
        return self._new(Node(kind))

    def may_open(self, path: Path) -> bool:
        """Whether a node is there, and opening it gives no error of permissions."""
        return path.exists() and self.open_errors.get(path.name) not in {errno.EACCES, errno.EPERM}

    def _new(self, node: Node) -> int:
        fd = os.memfd_create(node.kind)
        self.nodes[fd] = node
        return fd

    def close(self, fd: int) -> None:
        """Close a descriptor; the last one of the device resets it, the last one of the IOMMU unmaps all."""
        node = self.nodes.pop(fd)
        os.close(fd)
        if any(other is node for other in self.nodes.values()):
            return
        if node.kind == "device" or (node.kind == "cdev" and node.bound):
            self.device.released()
            if self.migration is not None:
                self.migration.released()
        if node.kind in {"container", "iommufd"} and all(other.kind != node.kind for other in self.nodes.values()):
            self.iommu.clear()

    def copy(self, fd: HasFileno) -> OwnedFd:
        """Another descriptor of the same open file, as a service manager keeps one."""
        copy = os.dup(fd.fileno())
        self.nodes[copy] = self.nodes[fd.fileno()]
        return OwnedFd(copy)

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        """Read a region."""
        assert self.nodes[fd].kind in {"device", "cdev"}
        return self.device.access(offset >> 40, offset & ((1 << 40) - 1), count, None)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write a region."""
        assert self.nodes[fd].kind in {"device", "cdev"}
        self.device.access(offset >> 40, offset & ((1 << 40) - 1), len(data), data)
        return len(data)

    def read(self, fd: int, count: int) -> bytes:
        """Read a migration's stream."""
        assert self.nodes[fd].kind == "data"
        assert self.migration is not None
        return self.migration.read(count)

    def write(self, fd: int, data: bytes) -> int:
        """Write a migration's stream."""
        assert self.nodes[fd].kind == "data"
        assert self.migration is not None
        return self.migration.write(data)

    def mmap(self, fd: int, size: int, offset: int, *, writable: bool) -> int:
        """Map a file."""
        if fd in self.nodes and self.nodes[fd].kind == "dma-buf" and self.dma_buf != "mmap":
            raise fail(errno.EINVAL)
        if writable and os.readlink(f"/proc/self/fd/{fd}").startswith("/dev/"):
            raise fail(errno.ENODEV)
        if writable and (_access_mode(fd) == os.O_RDONLY):
            raise fail(errno.EACCES)
        address = self._next_address
        self._next_address += size + 4096
        self.views[address] = View(os.dup(fd), offset, size, writable)
        return address

    def munmap(self, address: int, size: int) -> None:
        """Drop a mapping."""
        view = self.views.pop(address)
        assert view.size == size
        view.there = False
        os.close(view.fd)

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """Whatever the descriptor's kind can do; ENOTTY for the rest."""
        node = self.nodes[fd]
        if isinstance(argument, bytearray):
            return self._structured(node, request, argument)
        if node.kind == "container" and request == BASE:
            return 0
        if node.kind == "container" and request == BASE + 1:
            return int(argument == 3)
        if node.kind == "container" and request == BASE + 2:
            if self.set_iommu_errno is not None:
                raise fail(self.set_iommu_errno)
            return 0
        if node.kind in {"device", "cdev"} and request == BASE + 11:
            self.device.reset()
            if self.migration is not None:
                self.migration.reset()
            return 0
        raise fail(errno.ENOTTY)

    def _structured(self, node: Node, request: int, buffer: bytearray) -> int:
        if node.kind == "data" and request == BASE + 21 and self.migration is not None:
            self.migration.precopy_info(buffer)
            return 0
        handlers = {
            "group": self._group,
            "container": self._container,
            "device": self._device,
            "cdev": self._device,
            "iommufd": self._iommufd,
        }
        return handlers[node.kind](node, request, buffer)

    def _group(self, node: Node, request: int, buffer: bytearray) -> int:
        if request == BASE + 3:
            struct.pack_into("<I", buffer, 4, int(self.viable))
            return 0
        if request == BASE + 4:
            assert self.nodes[struct.unpack("<i", buffer)[0]].kind == "container"
            node.joined = True
            return 0
        if request == BASE + 6 and node.joined and bytes(buffer) == self.name.encode() + b"\0":
            if self.get_device_errno is not None:
                raise fail(self.get_device_errno)
            return self._new(Node("device"))
        raise fail(errno.EINVAL)

    def _device(self, node: Node, request: int, buffer: bytearray) -> int:
        if request == BASE + 18:
            if self.held or any(other.bound for other in self.nodes.values()):
                raise fail(errno.EINVAL)
            if self.bind_errno is not None:
                raise fail(self.bind_errno)
            node.bound = True
        elif request == BASE + 19:
            assert node.bound
        elif request == BASE + 7:
            struct.pack_into("<IIII", buffer, 0, 24, 2 | (self.device.has_reset and self.device.tells_reset), 9, 5)
        elif request == BASE + 8:
            self.device.region_info(buffer)
        elif request == BASE + 9:
            self.device.irq_info(buffer)
        elif request == BASE + 10:
            self.device.set_irqs(buffer)
        elif (
            request == BASE + 17
            and self.migration is not None
            and struct.unpack_from("<I", buffer, 4)[0] & 0xFFFF != 11
        ):
            body = bytearray(buffer[8:])
            fresh = self.migration.feature(struct.unpack_from("<I", buffer, 4)[0], body)
            buffer[8:] = body
            if fresh:
                struct.pack_into("<i", buffer, 12, self._new(Node("data")))
        elif request == BASE + 17 and self.dma_buf and struct.unpack_from("<I", buffer, 4)[0] == 1 << 16 | 11:
            return self._new(Node("dma-buf"))
        else:
            raise fail(errno.ENOTTY)
        return 0

    # DMA

    def _container(self, node: Node, request: int, buffer: bytearray) -> int:
        if request == BASE + 12:
            self._iommu_info(buffer)
        elif request == BASE + 13:
            _, flags, vaddr, iova, size = struct.unpack("<IIQQQ", buffer)
            self._map(vaddr, iova, size, flags)
        elif request == BASE + 14:
            _, flags, iova, size = struct.unpack_from("<IIQQ", buffer)
            if flags & 1:
                self._put_bitmap(buffer, 24, iova, size)
            done = self.iommu.unmap(0, 1 << 64) if flags & 2 else self.iommu.unmap(iova, size)
            struct.pack_into("<Q", buffer, 16, done)
        elif request == BASE + 17:
            self._dirty_pages(buffer)
        else:
            raise fail(errno.ENOTTY)
        return 0

    def _dirty_pages(self, buffer: bytearray) -> None:
        flags = struct.unpack_from("<I", buffer, 4)[0]
        if flags == 4:
            self._put_bitmap(buffer, 24, *struct.unpack_from("<QQ", buffer, 8))
        elif flags == 1:
            self.iommu.dirty = self.iommu.dirty or set()
        else:
            self.iommu.dirty = None

    def _put_bitmap(self, buffer: bytearray, offset: int, iova: int, size: int) -> None:
        page, room, address = struct.unpack_from("<QQQ", buffer, offset)
        bitmap = self.iommu.written(iova, size, page)
        if room < len(bitmap):
            raise fail(errno.EINVAL)
        ctypes.memmove(address, bitmap, len(bitmap))

    def _iommu_info(self, buffer: bytearray) -> None:
        windows = () if self.iommu.emulated else WINDOWS
        ranges = b"".join(struct.pack("<QQ", *window) for window in windows)
        capabilities = [(1, struct.pack("<II", len(windows), 0) + ranges)] if windows else []
        capabilities += [(2, struct.pack("<I4xQQ", 0, 4096, 1 << 28)), (3, struct.pack("<I4x", self.iommu.max_maps))]
        chain = b""
        for index, (number, body) in enumerate(capabilities, 1):
            following = 24 + len(chain) + 8 + len(body) if index < len(capabilities) else 0
            chain += struct.pack("<HHI", number, 1, following) + body
        needed, cap_offset = 24 + len(chain), 0
        if len(buffer) >= needed:
            cap_offset = 24
            buffer[24:needed] = chain
        struct.pack_into("<IIQI", buffer, 0, needed, 3, 0xFFFF_FFFF_FFFF_F000, cap_offset)

    def _map(self, vaddr: int, iova: int, size: int, flags: int) -> None:
        self.mapping.set()
        self.gate.wait(10)
        start = max(address for address in self.views if address <= vaddr)
        self.iommu.map(self.views[start], vaddr - start, iova, size, flags)

    def _iommufd(self, node: Node, request: int, buffer: bytearray) -> int:
        if request == IOMMUFD + 1:
            struct.pack_into("<I", buffer, 8, 5)
        elif request == IOMMUFD + 4:
            _, ioas, _, _, address, _ = struct.unpack("<IIIIQQ", buffer)
            assert ioas == 5
            flat = [number for window in WINDOWS for number in window]
            ctypes.memmove(address, struct.pack(f"<{len(flat)}Q", *flat), 8 * len(flat))
            struct.pack_into("<IIQQ", buffer, 8, len(WINDOWS), 0, address, 4096)
        elif request == IOMMUFD + 0xF:
            self._map_file(buffer)
        elif request == IOMMUFD + 5:
            _, flags, _, _, vaddr, size, iova = struct.unpack("<IIIIQQQ", buffer)
            self._map(vaddr, iova, size, _type1_flags(flags))
        elif request == IOMMUFD + 6 and self.unmap_errno is not None:
            raise fail(self.unmap_errno)
        elif request == IOMMUFD + 6:
            _, _, iova, size = struct.unpack("<IIQQ", buffer)
            if not self.iommu.unmap(iova, size):
                raise fail(errno.ENOENT)
        else:
            raise fail(errno.ENOTTY)
        return 0

    def _map_file(self, buffer: bytearray) -> None:
        """Pin a memfd, as the kernel does: whatever the descriptor or a seal allows."""
        if not self.map_file:
            raise fail(errno.ENOTTY)
        _, flags, _, fd, offset, size, iova = struct.unpack("<IIIiQQQ", buffer)
        name = os.readlink(f"/proc/self/fd/{fd}")
        if not name.startswith("/memfd:") or fd in self.nodes or offset + size > os.fstat(fd).st_size:
            raise fail(errno.EINVAL)
        self.iommu.map(View(fd, 0, os.fstat(fd).st_size, writable=True), offset, iova, size, _type1_flags(flags))


def _type1_flags(flags: int) -> int:
    assert flags & 1, "an address space chooses no addresses here"
    return flags >> 2 & 1 | flags & 2


def _access_mode(fd: int) -> int:
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("flags")), 8) & os.O_ACCMODE
