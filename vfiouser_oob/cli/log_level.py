"""`log-level`: what a running daemon logs from now on."""

from __future__ import annotations

import argparse

from vfiouser_oob.cli.administer import ask
from vfiouser_oob.cli.errors import ExitCode
from vfiouser_oob.cli.options import add_control_socket_argument, option
from vfiouser_oob.config.schema import LogLevel
from vfiouser_oob.config.values import NAME


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `log-level`."""
    parser.add_argument(
        "level", metavar="LEVEL", choices=[level.value for level in LogLevel], help="debug, info, warning or error"
    )
    parser.add_argument(
        "--function",
        metavar="NAME",
        type=option(NAME.read),
        help="only for this function (default: for the whole daemon)",
    )
    add_control_socket_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Choose it."""
    ask(args, "log-level", level=args.level, function=args.function)
    print(f"{args.function or 'daemon'}: logs {args.level} and above, until a restart")
    return ExitCode.DONE
