"""Kept descriptors: what they are called, and what they are."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from enum import Enum

from vfiouser_oob.systemd.fd_store import PREFIX
from vfiouser_oob.transport.fds import HasFileno


class DescriptorKind(Enum):
    """What a descriptor is, as far as a successor has to know."""

    SOCKET = "a socket"
    EVENTFD = "an eventfd"
    #: Anything that can be mapped: a memfd, a file in tmpfs or hugetlbfs, a DMA buffer.
    MEMORY = "a file"
    #: A container, group or device of vfio, or an iommufd.
    VFIO = "a descriptor of VFIO"
    OTHER = "something else"


#: How the kernel names what is open; the first that fits counts.
_TARGETS: Sequence[tuple[str, DescriptorKind]] = (
    ("socket:[", DescriptorKind.SOCKET),
    ("anon_inode:[eventfd]", DescriptorKind.EVENTFD),
    ("anon_inode:[vfio", DescriptorKind.VFIO),
    ("anon_inode:[iommufd]", DescriptorKind.VFIO),
    ("/dev/vfio/", DescriptorKind.VFIO),
    ("/dev/iommu", DescriptorKind.VFIO),
    ("/", DescriptorKind.MEMORY),
)


def kind_of_target(target: str) -> DescriptorKind:
    """What a descriptor is.

    Args:
        target: what its link in /proc/self/fd says.
    """
    return next((kind for prefix, kind in _TARGETS if target.startswith(prefix)), DescriptorKind.OTHER)


def kind_of(fd: HasFileno) -> DescriptorKind:
    """What a descriptor is; waits for nobody, whoever owns what is behind it.

    Args:
        fd: the descriptor; it stays the caller's.

    Raises:
        OSError: it is none.
    """
    return kind_of_target(os.readlink(f"/proc/self/fd/{fd.fileno()}"))


def function_name(function: str, part: str) -> str:
    """The name of what belongs to one function.

    Args:
        function: its name.
        part: what it is; unique for as long as the function lives, so that a name never means two descriptors.
    """
    return f"{PREFIX}f/{function}/{part}"


def vm_name(vm: str, part: str) -> str:
    """The name of what belongs to one VM.

    Args:
        vm: its name.
        part: what it is; as for a function.
    """
    return f"{PREFIX}v/{vm}/{part}"


def function_of(name: str) -> str | None:
    """The function that a kept descriptor belongs to; None if it belongs to several, or is none of ours."""
    parts = name.removeprefix(PREFIX).split("/")
    return parts[1] if name.startswith(PREFIX) and len(parts) == 3 and parts[0] == "f" else None


def eventfd_name(fd: HasFileno) -> str:
    """The name of an eventfd, which a client may give for several vectors and again and again: the kernel numbers them.

    Args:
        fd: the eventfd; it stays the caller's.

    Raises:
        OSError: the kernel does not number it (before 5.2).
    """
    with open(f"/proc/self/fdinfo/{fd.fileno()}", encoding="ascii") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key == "eventfd-id":
                return f"{PREFIX}irq/{int(value):x}"
    raise OSError(errno.ENOTSUP, "the kernel does not number eventfds")


def file_name(device: int, inode: int, access: int) -> str:
    """The name of a file of guest memory, which functions of one VM share.

    The manager keeps one open file once, under one name; so what several functions get of a VM is named by what it is.

    Args:
        device: the file's st_dev.
        inode: its st_ino.
        access: O_RDONLY, O_WRONLY or O_RDWR.
    """
    return f"{PREFIX}file/{device:x}-{inode:x}-{access:x}"
