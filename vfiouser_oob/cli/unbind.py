"""`unbind`: return a PCI function to its own driver."""

from __future__ import annotations

import argparse

from vfiouser_oob.cli.bind import SYSFS
from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.options import option
from vfiouser_oob.config.values import BDF
from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.devices.kernel_vfio import binding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `unbind`."""
    parser.add_argument("bdf", metavar="BDF", type=option(BDF.read), help="the function, e.g. 0000:3b:00.2")


def run(args: argparse.Namespace) -> int:
    """Unbind, and tell which driver has the function now."""
    try:
        node = binding.unbind(SYSFS, args.bdf)
    except BackendUnavailable as error:
        raise CommandFailed(str(error)) from error
    print(f"{args.bdf} is {f'bound to {node.driver}' if node.driver else 'without a driver'}")
    return ExitCode.DONE
