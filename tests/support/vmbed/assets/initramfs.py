"""The guest's whole userland: busybox, the kernel modules it must load, and `guest/init.sh`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from vmbed.assets.cpio import CpioWriter
from vmbed.assets.modules import load_order

__all__ = ["INIT", "NODES", "initramfs_recipe", "write_initramfs"]

INIT = Path(__file__).resolve().parent.parent / "guest" / "init.sh"
DRIVERS = ("nvme",)
# what the kernel opens before /dev is mounted; spec: Linux, Documentation/admin-guide/devices.txt
NODES = {"dev/console": (5, 1), "dev/null": (1, 3)}


def initramfs_recipe() -> str:
    """Return a name for what goes into the initramfs beside the packages; it changes when that does."""
    content = hashlib.sha256(INIT.read_bytes())
    content.update(repr((DRIVERS, sorted(NODES.items()))).encode())
    return content.hexdigest()[:16]


def write_initramfs(out: Path, kernel_tree: Path, busybox: Path, drivers: Iterable[str] = DRIVERS) -> None:
    """Write the initramfs, uncompressed: an emulated CPU takes longer to inflate it than to copy it."""
    modules = load_order(kernel_tree, drivers)
    with out.open("wb") as file:
        archive = CpioWriter(file)
        for name, (major, minor) in NODES.items():
            archive.character_device(name, major, minor)
        archive.file("bin/busybox", busybox.read_bytes(), 0o755)
        archive.file("init", INIT.read_bytes(), 0o755)
        for name, module in modules:
            archive.file(f"modules/{name}.ko", module)
        archive.file("modules/order", " ".join(name for name, _ in modules).encode())
        archive.close()
