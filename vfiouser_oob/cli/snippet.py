"""`snippet`: what to tell a VMM so that it uses a function."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from pathlib import Path

from vfiouser_oob.cli.errors import ExitCode
from vfiouser_oob.cli.options import option
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.load import load_config
from vfiouser_oob.config.schema import DEFAULT_SOCKET_GROUP, DaemonConfig, FunctionConfig, KernelVfioDevice
from vfiouser_oob.config.tables import suggestion
from vfiouser_oob.config.values import PATH, SIZE, format_size

DEFAULT_CONFIG = Path("/etc/vfiouser-oob/config.toml")
# Where the socket units that we ship listen.
UNIT_SOCKET_DIR = Path("/run/vfio-user")
DEFAULT_MEMORY = 1 << 30
# The client must wait longer than the daemon's own limit, or it gives up on a reply that is under way.
TIMEOUT_MARGIN_S = 1.0
# What the IOMMU locks in a second, of memory that is allocated already, on a machine that is not the fastest.
LOCKED_PER_SECOND = 4 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `snippet`."""
    parser.add_argument("vmm", choices=["qemu"], help="for which VMM")
    parser.add_argument("name", metavar="NAME", help="name of the function")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=option(PATH.read),
        default=DEFAULT_CONFIG,
        help=f"the daemon's configuration (default: {DEFAULT_CONFIG})",
    )
    parser.add_argument(
        "--memory",
        metavar="BYTES",
        type=option(SIZE.read),
        default=DEFAULT_MEMORY,
        help=f"the VM's memory (default: {format_size(DEFAULT_MEMORY)})",
    )


def socket_path(function: FunctionConfig) -> Path:
    """The path that a VMM connects to, absolute."""
    return (function.socket or UNIT_SOCKET_DIR / f"{function.name}.sock").absolute()


def qemu_device(function: FunctionConfig, reply_budget_s: float) -> str:
    """The JSON value of QEMU's ``-device`` option.

    Args:
        function: the function to use.
        reply_budget_s: seconds that the daemon takes at most for a reply.

    Spec: QEMU's vfio-user-pci properties.
    """
    return json.dumps(
        {
            "driver": "vfio-user-pci",
            "id": f"vfio-{function.name}",
            "socket": {"type": "unix", "path": str(socket_path(function))},
            "x-msg-timeout": round((reply_budget_s + TIMEOUT_MARGIN_S) * 1000),
        }
    )


def _locks_memory(function: FunctionConfig) -> bool:
    """Whether an IOMMU takes hold of all memory; without one, as for a mediated device, pages are taken as needed."""
    return isinstance(function.device, KernelVfioDevice) and function.device.mdev is None


def needed_budget_s(config: DaemonConfig, function: FunctionConfig, memory: int) -> float:
    """The reply budget that a VM of this size should have: the configured one, unless that looks too small.

    Args:
        config: the daemon's configuration.
        function: the function to use; only a real one has all of the memory locked within one message.
        memory: bytes of guest memory.
    """
    if not _locks_memory(function):
        return config.reply_budget_s
    return max(config.reply_budget_s, float(math.ceil(memory / LOCKED_PER_SECOND)))


def qemu_arguments(config: DaemonConfig, function: FunctionConfig, memory: int) -> list[list[str]]:
    """QEMU's options, one list of words per line.

    Args:
        config: the daemon's configuration.
        function: the function to use.
        memory: bytes of guest memory, shared so that the device can reach it without messages.
    """
    size = format_size(memory)
    # The IOMMU pins all of it at attach: allocated beforehand, that fits into the time of one reply.
    prealloc = ",prealloc=on" if _locks_memory(function) else ""
    return [
        ["-m", size],
        ["-object", f"memory-backend-memfd,id=vfio-user-ram,size={size},share=on{prealloc}"],
        ["-machine", "q35,memory-backend=vfio-user-ram"],
        ["-device", qemu_device(function, needed_budget_s(config, function, memory))],
    ]


def run(args: argparse.Namespace) -> int:
    """Print the snippet; what else to mind goes to standard error."""
    config = load_config(args.config)
    function = config.function(args.name)
    if function is None:
        names = [known.name for known in config.functions]
        raise ConfigError(f"no function is named {args.name!r}{suggestion(args.name, names)}", str(args.config))
    lines = qemu_arguments(config, function, args.memory)
    print(" \\\n".join(shlex.join(words) for words in lines))
    group = function.socket_group or DEFAULT_SOCKET_GROUP
    print(
        f"note: add these to `qemu-system-x86_64` (10.1 or later); its user needs access to "
        f"{socket_path(function)} (mode {function.socket_mode:04o}, normally group {group})",
        file=sys.stderr,
    )
    needed = needed_budget_s(config, function, args.memory)
    if needed > config.reply_budget_s:
        print(
            f"note: locking {format_size(args.memory)} may take longer than reply_budget_s = {config.reply_budget_s:g} "
            f"allows: set reply_budget_s = {needed:g} under [daemon]; the x-msg-timeout above goes with that",
            file=sys.stderr,
        )
    return ExitCode.DONE
