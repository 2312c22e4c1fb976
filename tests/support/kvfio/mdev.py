"""facts"""

from __future__ import annotations
import os, struct
from collections.abc import Callable, Mapping
from pathlib import Path
from vfiouser_oob.devices.kernel_vfio.kernel import LinuxKernel
from vfiouser_oob.devices.kernel_vfio.openers import choose_opener
from vfiouser_oob.devices.kernel_vfio.migration_device import MigrationDevice
from vfiouser_oob.devices.kernel_vfio import uapi
from kvfio import bed


def facts() -> None:
    u = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    for p in Path("/sys/class/mdev_bus").glob("*/mdev_supported_types/*"):
        print(
            p,
            [q.name for q in p.iterdir()],
            (p / "device_api").read_text(),
            (p / "name").read_text() if (p / "name").exists() else "",
        )
    kernel = LinuxKernel()
    try:
        choose_opener(kernel, u)
    except Exception as e:
        print(repr(e))
    (Path("/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-1/create")).write_text(u)
    d = Path("/sys/bus/mdev/devices") / u
    print([(q.name, os.readlink(q) if q.is_symlink() else "") for q in d.iterdir()])
    o = choose_opener(kernel, u).open()
    print("flags", o.device.flags, "regions", o.device.regions, "irqs", o.device.irqs)
    s = o.space
    print("page", s.page_size, "windows", s.windows, "max", s.max_maps)
    buf = bytearray(4096)
    uapi.IOMMU_TYPE1_INFO.pack_into(buf, 0, 4096, 0, 0, 0)
    kernel.ioctl(s._fd, uapi.VFIO_IOMMU_GET_INFO, buf)
    print(buf[:200].hex())
    print(uapi.IOMMU_TYPE1_INFO.unpack_from(buf))
    m = MigrationDevice(kernel, o.device)
    print("mig", m.flags(), m.can_log, m.state(), m.data_size())
    fd = os.memfd_create("x")
    os.ftruncate(fd, 1 << 20)
    for args in ((0x1000, 0x1000), (0xFEE00000, 0x1000), (1 << 50, 0x1000), (0, 100)):
        try:
            s.map(fd, 0, args[0], args[1], read=True, write=True)
            print("map ok", args)
        except OSError as e:
            print("map", args, e)
    os.ftruncate(fd, 0)
    try:
        s.map(fd, 0, 1 << 30, 1 << 20, read=True, write=True)
        print("map of truncated ok")
    except OSError as e:
        print("map trunc", e)
    DIRTY = uapi._VFIO_IO + 17
    import ctypes

    def dirty(flags, *a):
        b = bytearray(struct.pack("=II", 8 + (40 if a else 0), flags) + (struct.pack("=QQQQQ", *a) if a else b""))
        return kernel.ioctl(s._fd, DIRTY, b)

    try:
        print("start", dirty(1))
        w = (ctypes.c_uint64 * 64)()
        print("get", dirty(4, 0x1000, 0x1000, 4096, 8, ctypes.addressof(w)), w[0])
    except OSError as e:
        print("dirty", e)
    s.map(fd, 0, 0x5000, 0x1000, read=True, write=True)
    for a in (
        (0x1000, 0x5000, 4096, 8),
        (0x1000, 0x800, 4096, 8),
        (0x1000, 0x1000, 8192, 8),
        (0x1000, 0x1000, 4096, 16),
        (0x9000, 0x1000, 4096, 8),
        (0x4000, 0x1000, 4096, 8),
    ):
        w[0] = 0
        try:
            print("get", a, dirty(4, *a, ctypes.addressof(w)), w[0])
        except OSError as e:
            print("get", a, e)
    try:
        print("start again", dirty(1))
    except OSError as e:
        print("start again", e)
    b = bytearray(struct.pack("=IIQQQQQ", 48, 1, 0x5000, 0x1000, 4096, 8, ctypes.addressof(w)))
    w[0] = 0
    try:
        print("unmap", kernel.ioctl(s._fd, uapi.VFIO_IOMMU_UNMAP_DMA, b), w[0], b.hex())
    except OSError as e:
        print("unmap", e)
    print("stop", dirty(2))
    try:
        print("stop", dirty(2))
    except OSError as e:
        print("stop again", e)
    try:
        print("get stopped", dirty(4, 0x1000, 0x1000, 4096, 8, ctypes.addressof(w)))
    except OSError as e:
        print("get stopped", e)
    b = bytearray(struct.pack("=IIQQQQQ", 48, 1, 0x1000, 0x1000, 4096, 8, ctypes.addressof(w)))
    try:
        print("unmap", kernel.ioctl(s._fd, uapi.VFIO_IOMMU_UNMAP_DMA, b), w[0], b.hex())
    except OSError as e:
        print("unmap stopped", e)
    fd2 = m.set_state(6)
    print("precopy fd", fd2, m.state(), os.readlink(f"/proc/self/fd/{fd2}"))
    o.close()
    os.close(fd2)
    o = choose_opener(kernel, u).open()
    m = MigrationDevice(kernel, o.device)
    print("state after reopen", m.state())
    o.device.reset()
    print("state after reset", m.state())
    o.close()
    (d / "remove").write_text("1")


SCENARIOS: Mapping[str, Callable[[], None]] = {"facts": facts}
