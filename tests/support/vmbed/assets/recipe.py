"""What is fetched from the archive, and what is kept of it.

* QEMU from `trixie-backports`: the first Debian suite whose QEMU (>= 10.1) has a vfio-user client. Its
  libraries come with it, down to the C library, and it runs through its own dynamic loader, so that
  the machine's own release does not matter.
* the kernel in its `cloud` flavour, a third of the download of the ordinary one and the shortest boot.
  From the backports suite too, because Debian's older kernels are built without CONFIG_PCI_P2PDMA,
  without which the nvme driver leaves a controller memory buffer alone.
* busybox, static.
* for the long tests, the cloud kernel of the oldest suite that is supported.
"""

from __future__ import annotations

import hashlib
import re

__all__ = [
    "BACKPORTS",
    "BUSYBOX_PACKAGE",
    "KERNEL_FILES",
    "KERNEL_NEEDS",
    "KERNEL_PACKAGE",
    "OLDEST_SUITE",
    "PRUNE",
    "QEMU_MINIMUM",
    "QEMU_NEEDS",
    "QEMU_PACKAGE",
    "SUITE",
    "recipe",
]

SUITE = "trixie"
BACKPORTS = "trixie-backports"
QEMU_PACKAGE = "qemu-system-x86"
QEMU_MINIMUM = (10, 1)
KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE = "busybox-static"
OLDEST_SUITE = "bookworm"

# Of what QEMU depends on, the parts that it loads or opens; the rest (passwd, PAM, network boot ROMs)
# only serves an installation.
QEMU_NEEDS = re.compile(r"^(lib(?!pam|apt|debconf)|qemu-system-|seabios$|zlib)")
KERNEL_NEEDS = re.compile(r"^linux-(image|binary|modules|base)-\d")
# unpacked, but of no use to a test
PRUNE = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/qemu/edk2-*", "usr/share/icons")

# where older and newer packages have them
KERNEL_FILES = {
    "vmlinuz": ("boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz"),
    "busybox": ("usr/bin/busybox", "bin/busybox"),
}

RECIPE = "2"  # raise it when the layout of the trees changes


def recipe() -> str:
    """Return a name for what is fetched and how it is laid out; it changes when these do."""
    parts = (RECIPE, SUITE, BACKPORTS, QEMU_PACKAGE, KERNEL_PACKAGE, BUSYBOX_PACKAGE)
    patterns = (QEMU_NEEDS.pattern, KERNEL_NEEDS.pattern, *PRUNE)
    return hashlib.sha256(repr((parts, patterns)).encode()).hexdigest()[:16]
