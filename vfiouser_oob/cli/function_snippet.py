"""What QEMU is to be started with to use one function."""

from __future__ import annotations

import json
import math
from pathlib import Path

from vfiouser_oob.config.schema import DaemonConfig, FunctionConfig, KernelVfioDevice
from vfiouser_oob.config.values import format_size

# Where the socket units that we ship listen.
UNIT_SOCKET_DIR = Path("/run/vfio-user")
# The client must wait longer than the daemon's own limit, or it gives up on a reply that is under way.
TIMEOUT_MARGIN_S = 1.0
# What the IOMMU locks in a second, of memory that is allocated already, on a machine that is not the fastest.
LOCKED_PER_SECOND = 4 << 30


def socket_path(function: FunctionConfig) -> Path:
    """The path that a VMM connects to, absolute."""
    return (function.socket or UNIT_SOCKET_DIR / f"{function.name}.sock").absolute()


def qemu_client(function: FunctionConfig, reply_budget_s: float, **properties: str) -> str:
    """The JSON value of QEMU's ``-device`` option.

    Args:
        function: the function to use.
        reply_budget_s: seconds that the daemon takes at most for a reply.
        properties: the device's id, and where it is.

    Spec: QEMU's vfio-user-pci properties.
    """
    return json.dumps(
        {
            "driver": "vfio-user-pci",
            **properties,
            "socket": {"type": "unix", "path": str(socket_path(function))},
            "x-msg-timeout": round((reply_budget_s + TIMEOUT_MARGIN_S) * 1000),
        }
    )


def memory_locked(function: FunctionConfig) -> bool:
    """Whether an IOMMU takes hold of all memory; without one, as for a mediated device, pages are taken as needed."""
    return isinstance(function.device, KernelVfioDevice) and function.device.mdev is None


def needed_budget_s(config: DaemonConfig, function: FunctionConfig, memory: int) -> float:
    """The reply budget that a VM of this size should have: the configured one, unless that looks too small.

    Args:
        config: the daemon's configuration.
        function: the function to use; only a real one has all of the memory locked within one message.
        memory: bytes of guest memory.
    """
    if not memory_locked(function):
        return config.reply_budget_s
    return max(config.reply_budget_s, float(math.ceil(memory / LOCKED_PER_SECOND)))


def qemu_memory(memory: int, *, locked: bool) -> list[list[str]]:
    """QEMU's options for memory that is shared, so that a device can reach it without messages.

    Args:
        memory: bytes of guest memory.
        locked: an IOMMU will pin all of it at attach; allocated beforehand, that fits into the time of one reply.
    """
    size = format_size(memory)
    prealloc = ",prealloc=on" if locked else ""
    return [
        ["-m", size],
        ["-object", f"memory-backend-memfd,id=vfio-user-ram,size={size},share=on{prealloc}"],
        ["-machine", "q35,memory-backend=vfio-user-ram"],
    ]


def qemu_arguments(config: DaemonConfig, function: FunctionConfig, memory: int) -> list[list[str]]:
    """QEMU's options, one list of words per line.

    Args:
        config: the daemon's configuration.
        function: the function to use.
        memory: bytes of guest memory.
    """
    device = qemu_client(function, needed_budget_s(config, function, memory), id=f"vfio-{function.name}")
    return [*qemu_memory(memory, locked=memory_locked(function)), ["-device", device]]
