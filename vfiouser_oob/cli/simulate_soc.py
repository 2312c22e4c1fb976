"""`simulate-soc`: a stand-in for an IPU/DPU with NVMe functions."""

from __future__ import annotations

import argparse

from vfiouser_oob.cli.errors import ExitCode
from vfiouser_oob.cli.options import add_logging_arguments, count, option
from vfiouser_oob.config.devices import read_cmb_size, read_namespace_size
from vfiouser_oob.config.schema import Doorbells, LogFormat, LogLevel
from vfiouser_oob.config.soc import FUNCTIONS_MAX, SocOptions
from vfiouser_oob.config.values import read_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `simulate-soc`."""
    parser.add_argument(
        "--socket-dir",
        metavar="DIR",
        type=option(read_path),
        required=True,
        help="directory for the functions' sockets, f0.sock, f1.sock …",
    )
    parser.add_argument(
        "--functions",
        metavar="N",
        type=count(1, FUNCTIONS_MAX),
        default=1,
        help="how many functions (default: 1)",
    )
    parser.add_argument(
        "--size",
        metavar="BYTES",
        type=option(read_namespace_size),
        help="size of each namespace, for example 64M (default: the image's, or 64M of RAM)",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        type=option(read_path),
        help="file behind the namespace; with several functions FILE.0, FILE.1 … (default: RAM)",
    )
    parser.add_argument(
        "--cmb",
        metavar="BYTES",
        type=option(read_cmb_size),
        default=0,
        help="controller memory buffer of each function, at least 2M (default: none)",
    )
    parser.add_argument(
        "--doorbells",
        choices=[way.value for way in Doorbells],
        default=Doorbells.TRAPPED.value,
        help="as messages, or in shared memory that the controller polls (default: trapped)",
    )
    add_logging_arguments(parser)


def options_from(args: argparse.Namespace) -> SocOptions:
    """The simulator's options out of the command line."""
    return SocOptions(
        socket_dir=args.socket_dir,
        functions=args.functions,
        size=args.size,
        image=args.image,
        cmb=args.cmb,
        doorbells=Doorbells(args.doorbells),
        log_level=LogLevel(args.log_level or LogLevel.INFO),
        log_format=LogFormat(args.log_format or LogFormat.HUMAN),
    )


def run(args: argparse.Namespace) -> int:
    """Play the SoC until told to stop."""
    options = options_from(args)
    import trio

    from vfiouser_oob.observability import log
    from vfiouser_oob.simulator.soc import run_soc

    log.configure(options.log_level, options.log_format)
    trio.run(run_soc, options)
    return ExitCode.DONE
