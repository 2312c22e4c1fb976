"""A guest that runs the checkout's own code: the assets' initramfs with Python, more drivers and our packages on top.

Later archives of an initramfs add to, and replace parts of, earlier ones.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from vmbed.assets import Assets
from vmbed.assets.cpio import CpioWriter
from vmbed.assets.modules import load_order
from vmbed.assets.python import compile_tree, interpreter
from vmbed.errors import BedError
from vmbed.qemu import GUEST_QEMU

__all__ = ["ENVIRONMENT", "PYTHON", "write_python_guest"]

CHECKOUT = Path(__file__).resolve().parents[3]
#: Where things are in the guest.
PYTHON = "/usr/bin/python3"
SITE = "site"
#: What Python needs in the environment there.
ENVIRONMENT = f"PYTHONPATH=/{SITE} PYTHONDONTWRITEBYTECODE=1"
BASE_DRIVERS = ("nvme",)
#: What the daemon imports, as this interpreter has it; their C parts are left out, they are for another Python. What
#: does nothing without its C parts comes with the guest's Python (`assets.python`).
THIRD_PARTY = ("attr", "attrs", "construct", "idna", "msgpack", "outcome", "sniffio", "sortedcontainers", "trio")
OWN = ("vfiouser_oob", "protocol/vfiouser_protocol", "agents/vfiouser_agents")
UNWANTED = shutil.ignore_patterns("__pycache__", "*.so", "*.pyi", "_tests", "tests", "lib2to3")
#: Of the QEMU tree, what a machine without CPU and guest opens.
QEMU_PARTS = (
    "usr/bin/qemu-system-x86_64",
    "usr/lib",
    "usr/share/qemu/bios*",
    "usr/share/qemu/linuxboot*",
    "usr/share/seabios",
)
QEMU_UNWANTED = ("/gconv/", "/perl")


def write_python_guest(
    out: Path,
    assets: Assets,
    scratch: Path,
    *,
    drivers: Sequence[str],
    support: Sequence[str],
    kernel: Path | None = None,
    qemu: bool = False,
) -> None:
    """Write the initramfs.

    Args:
        out: the file.
        assets: the bed's assets.
        scratch: a folder for files on their way.
        drivers: kernel modules to load beside those of the bed's own initramfs.
        support: packages of tests/support that the guest runs.
        kernel: the guest's vmlinuz, beside its modules; None: the assets' own.
        qemu: put QEMU into it as well, with the assets' own kernel and initramfs for its guest.
    """
    site = scratch / SITE
    _gather(site, support)
    compile_tree(assets.python, [site], strip=scratch, prepend="/")
    with out.open("wb") as file:
        file.write(assets.initramfs.read_bytes())
        archive = CpioWriter(file)
        modules = load_order((kernel or assets.kernel).parent, [*BASE_DRIVERS, *drivers])
        for name, module in modules:
            archive.file(f"modules/{name}.ko", module)
        archive.file("modules/order", " ".join(name for name, _ in modules).encode())
        archive.link("lib", "usr/lib")
        archive.link("lib64", "usr/lib64")
        _add_tree(archive, assets.python, "", ("usr/bin", "usr/lib", "usr/lib64"), QEMU_UNWANTED)
        archive.link(PYTHON.lstrip("/"), interpreter(assets.python).name)
        _add_tree(archive, scratch, "", (SITE,), ())
        if qemu:
            archive.file(f"{GUEST_QEMU.relative_to('/')}/vmlinuz", assets.kernel.read_bytes())
            archive.file(f"{GUEST_QEMU.relative_to('/')}/initramfs", assets.initramfs.read_bytes())
            _add_tree(archive, assets.qemu_root, str(GUEST_QEMU.relative_to("/")), QEMU_PARTS, QEMU_UNWANTED)
        archive.close()


def _gather(site: Path, support: Iterable[str]) -> None:
    for name in OWN:
        shutil.copytree(CHECKOUT / name, site / Path(name).name, ignore=UNWANTED)
    for name in support:
        shutil.copytree(CHECKOUT / "tests/support" / name, site / name, ignore=UNWANTED)
    for name in THIRD_PARTY:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise BedError(f"the guest needs the package {name}, and {sys.executable} has none to copy")
        shutil.copytree(Path(spec.origin).parent, site / name, ignore=UNWANTED)


def _add_tree(archive: CpioWriter, root: Path, prefix: str, parts: Sequence[str], unwanted: Sequence[str]) -> None:
    for part in parts:
        for start in sorted(root.glob(part)):
            for path in [start, *sorted(start.rglob("*"))] if start.is_dir() else [start]:
                name = str(Path(prefix) / path.relative_to(root))
                if any(text in f"/{name}/" for text in unwanted):
                    continue
                if path.is_symlink():
                    archive.link(name, os.readlink(path))
                elif path.is_file():
                    archive.file(name, path.read_bytes(), path.stat().st_mode & 0o777)
