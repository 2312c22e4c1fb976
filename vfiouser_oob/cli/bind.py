"""`bind`: hand a PCI function to vfio-pci."""

from __future__ import annotations

import argparse
import pwd
from pathlib import Path

from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.options import option
from vfiouser_oob.config.values import BDF
from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.devices.kernel_vfio import binding

SYSFS = Path("/sys")
DEV = Path("/dev")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bind`."""
    parser.add_argument("bdf", metavar="BDF", type=option(BDF.read), help="the function, e.g. 0000:3b:00.2")
    parser.add_argument("--owner", metavar="USER", type=_user, help="user who will own the function's VFIO nodes")


def _user(text: str) -> int:
    try:
        return int(text) if text.isdecimal() else pwd.getpwnam(text).pw_uid
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no user {text!r}") from None


def run(args: argparse.Namespace) -> int:
    """Bind, and tell what a daemon needs to know."""
    try:
        node = binding.bind(SYSFS, args.bdf)
    except BackendUnavailable as error:
        raise CommandFailed(str(error)) from error
    nodes = binding.vfio_nodes(node, DEV)
    if args.owner is not None:
        for path in nodes:
            binding.give(path, args.owner)
    names = ", ".join(map(str, nodes)) or "none yet: load the kernel's module with `modprobe vfio-pci`"
    print(f"{args.bdf} is bound to {node.driver}, IOMMU group {node.iommu_group}, node {names}")
    others = node.group_obstacles()
    if others:
        print(f"not usable yet: other members of its IOMMU group have other drivers: {', '.join(others)}")
    return ExitCode.DONE
